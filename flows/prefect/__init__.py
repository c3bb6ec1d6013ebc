"""The benchmark as a Prefect flow, and what such a run owes to its server."""
