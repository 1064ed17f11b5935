"""Bits per byte on held-out text: the number that does not depend on the tokenizer."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np

from MaxNano.data import loader

Batch = dict[str, np.ndarray]


class PackedRows:
    """Validation rows, packed once and kept, so that no evaluation reads or tokenizes text again.

    A row is kept as length + 1 ids of the smallest signed type that holds the vocabulary; an id that is not to be
    predicted is kept as its complement, as loader.to_batch takes it.
    """

    def __init__(self, batches: Iterable[Batch], count: int, vocab_size: int):
        dtype = np.int16 if vocab_size <= 2**15 else np.int32
        self._batches = [_rows_of(batch).astype(dtype) for batch in islice(batches, count)]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        for rows in self._batches:
            yield loader.to_batch(rows.astype(np.int32))


def _rows_of(batch: Batch) -> np.ndarray:
    """The rows of length + 1 ids that a batch was made of; an ignored last target is ~0."""
    inputs, targets = batch["inputs"], batch["targets"]
    ids = np.concatenate([inputs[:, 1:], np.maximum(targets[:, -1:], 0)], axis=1)
    return np.concatenate([inputs[:, :1], np.where(targets < 0, ~ids, ids)], axis=1)


def evaluate_bpb(
    count_bits: Callable[[Batch], tuple[float, float]], batches: Iterable[Batch]
) -> dict[str, float]:
    """{"bpb": bits per byte} over batches; infinite if there is no byte.

    `count_bits(batch)` gives the nats of the targets that stand for bytes, and the number of those bytes;
    special tokens and ignored targets count in neither. Source: nanochat/loss_eval.py@92d63d4.
    """
    counts = [count_bits(batch) for batch in batches]
    # Only here does the host wait for the device, so that batches overlap.
    nats = math.fsum(float(nats) for nats, _ in counts)
    size = math.fsum(float(size) for _, size in counts)
    return {"bpb": nats / (math.log(2) * size) if size else math.inf}
