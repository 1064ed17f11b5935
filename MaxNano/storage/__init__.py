"""Files on disk and in buckets: atomic writes, gs:// through gcsfs, and calls with time limits. No JAX."""
