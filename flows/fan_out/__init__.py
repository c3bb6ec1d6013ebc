"""The benchmark on several machines: a coordinator, and cells on workers."""
