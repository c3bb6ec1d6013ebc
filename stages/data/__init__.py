"""Where data comes from: `fetch` an archive, `verify` its SHA-256, `unpack` it, decode it in `sources`."""
