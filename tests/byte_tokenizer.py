"""Tokenizers for tests of the data pipeline, in a module that spawned workers can import."""

import sys

import numpy as np

BOS = 256


class ByteTokenizer:
    """A token per byte."""

    bos_id = BOS

    def encode_batch(self, texts: list[str], bos: bool) -> list[np.ndarray]:
        assert bos
        return [np.concatenate([[BOS], np.frombuffer(text.encode(), np.uint8)]) for text in texts]


class CountingTokenizer:
    """Reads "NUMBER LENGTH" as a document of LENGTH tokens, each of them NUMBER."""

    bos_id = 1000

    def encode_batch(self, texts: list[str], bos: bool) -> list[list[int]]:
        assert bos
        pairs = (map(int, text.split()) for text in texts)
        return [[self.bos_id] + [number] * length for number, length in pairs]


class JaxReportingTokenizer:
    """Every document becomes whether JAX has been imported in the process that encodes it."""

    bos_id = 0

    def encode_batch(self, texts: list[str], bos: bool) -> list[list[int]]:
        return [[int("jax" in sys.modules)] for _ in texts]


class FailingTokenizer:
    """Fails with the error it is given."""

    bos_id = 0

    def __init__(self, error: Exception):
        self.error = error

    def encode_batch(self, texts: list[str], bos: bool) -> list[list[int]]:
        raise self.error
