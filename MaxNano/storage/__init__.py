"""Files on disk and in buckets: atomic writes, gs://, checkpoint folders and the lock of a run. No
JAX.
"""
