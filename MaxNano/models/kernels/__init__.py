"""Pallas kernels for TPU. Tests compare each with attention's `reference`."""
