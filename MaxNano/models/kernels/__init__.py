"""Pallas kernels for TPU, each beside a reference in plain JAX that tests compare it with."""
