"""Bits per byte on held-out text: the number that does not depend on the tokenizer."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np

Batch = dict[str, np.ndarray]


class PackedRows:
    """Validation rows, packed once and kept, so that no evaluation reads or tokenises text again.

    A row is kept as length + 1 ids of the smallest unsigned type that holds the vocabulary.
    """

    def __init__(self, batches: Iterable[Batch], count: int, vocab_size: int):
        dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
        self._batches = [
            np.concatenate([batch["inputs"], batch["targets"][:, -1:]], axis=1).astype(dtype)
            for batch in islice(batches, count)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        for rows in self._batches:
            rows = rows.astype(np.int32)
            yield {
                "inputs": rows[:, :-1],
                "targets": rows[:, 1:],
                "weights": np.ones(rows[:, 1:].shape, np.float32),
            }


def evaluate_bpb(count_bits: Callable[[Batch], tuple[float, float]], batches: Iterable[Batch]) -> dict[str, float]:
    """{"bpb": bits per byte} over batches; infinite if there is no byte.

    `count_bits(batch)` gives the nats of the targets that stand for bytes, and the number of those bytes;
    special tokens and ignored targets count in neither. Source: nanochat/loss_eval.py@92d63d4.
    """
    counts = [count_bits(batch) for batch in batches]
    # Only here does the host wait for the device, so that batches overlap.
    nats = math.fsum(float(nats) for nats, _ in counts)
    size = math.fsum(float(size) for _, size in counts)
    return {"bpb": nats / (math.log(2) * size) if size else math.inf}
