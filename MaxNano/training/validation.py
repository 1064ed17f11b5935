"""Bits per byte on text: a loss that does not depend on the tokenizer."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from MaxNano import console, pyconfig
from MaxNano.data import held_out, loader
from MaxNano.data.loader import Batch
from MaxNano.distributed import runtime
from MaxNano.tokenization.tokenizer import load_tokenizer
from MaxNano.training.display import duration

WARM_UP_BATCHES = 3  # they may include compilation
MEASURED_SECONDS, LONG_SECONDS = 10.0, 60.0


class PackedRows:
    """Held-out batches, packed once and kept in memory for every later validation.

    A row is kept as length + 1 ids of the smallest signed type that holds the tokenizer's ids. The
    complement of an id marks a token that is no target, as in loader.to_batch.
    """

    def __init__(self, batches: Iterable[Batch], count: int, vocab_size: int):
        """Keep the first `count` batches of ids below `vocab_size`."""
        dtype = np.int16 if vocab_size <= 2**15 else np.int32
        self._batches = [_rows_of(batch).astype(dtype) for batch in islice(batches, count)]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        for rows in self._batches:
            yield loader.to_batch(rows.astype(np.int32))


def _rows_of(batch: Batch) -> np.ndarray:
    """The rows of length + 1 ids of a batch; ~0 stands for an ignored last target."""
    inputs, targets = batch["inputs"], batch["targets"]
    ids = np.concatenate([inputs[:, 1:], np.maximum(targets[:, -1:], 0)], axis=1)
    return np.concatenate([inputs[:, :1], np.where(targets < 0, ~ids, ids)], axis=1)


def tell_if_long(
    batches: Iterable[Batch],
    count: int,
    what: str,
    tell: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Batch]:
    """The first `count` batches. After MEASURED_SECONDS a line tells how long all of them take, if
    that is more than LONG_SECONDS: nothing else is printed until they are done.
    """
    started: float | None = clock()
    for done, batch in enumerate(islice(batches, count)):
        if done == WARM_UP_BATCHES:
            started = clock()
        measured = done - WARM_UP_BATCHES
        if measured > 0 and started is not None and clock() - started > MEASURED_SECONDS:
            seconds, started = (clock() - started) / measured * count, None
            if seconds > LONG_SECONDS:
                tell(f"{what} takes about {duration(seconds)}; a smaller eval_tokens takes less")
        yield batch


def bits_per_byte(
    count_bits: Callable[[Batch], tuple[float, float]], batches: Iterable[Batch]
) -> float:
    """Bits per byte over batches; infinite if there is no byte.

    count_bits: batch -> (nats, bytes) of the targets that stand for bytes. Special tokens and
    ignored targets count in neither. Source: nanochat/loss_eval.py@92d63d4.
    """
    counts = list(runtime.limit_in_flight(count_bits(batch) for batch in batches))
    nats = math.fsum(float(nats) for nats, _ in counts)
    size = math.fsum(float(size) for _, size in counts)
    return nats / (math.log(2) * size) if size else math.inf


# ---- How much validates -------------------------------------------------------------------------


def with_eval_tokens(config: FrozenConfigDict) -> FrozenConfigDict:
    """The config with a number of eval_tokens, which null leaves to the validation data."""
    if config.eval_tokens is not None:
        return config
    try:
        return held_out.with_eval_tokens(config, load_tokenizer(config))
    except ValueError:  # no tokenizer yet, as in a dry run; reported where it is needed
        return pyconfig.replace(config, held_out.ORIGIN, eval_tokens=held_out.most_tokens(config))


def warn_if_small(config: FrozenConfigDict) -> None:
    """Warn of a validation set whose bits per byte say little."""
    if not config.eval_interval or jax.process_index() > 0:
        return
    try:
        problem = held_out.small(config, load_tokenizer(config))
    except ValueError:
        return  # as above
    if problem:
        console.warn(problem)
