"""Bits per byte: the stage's validation in training, and both splits in evaluate.py."""

import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

from ml_collections import FrozenConfigDict

from MaxNano import pyconfig
from MaxNano.data import fingerprint
from MaxNano.evals.results import Results, ResultTable, measured_with
from MaxNano.training import stages
from MaxNano.training.context import RunContext, eval_batches
from MaxNano.training.validation import bits_per_byte


class BpbEval:
    """Validation of a stage, and bits per byte; see base.Eval."""

    event = "validation"
    at_start = True

    def __init__(self, run: RunContext):
        self._run = run

    @staticmethod
    def interval(config: FrozenConfigDict) -> int:
        return config.eval_interval

    def measure(self, results: Results) -> dict[str, float]:
        """What the stage validates on held-out data: bits per byte, or another metric."""
        return self._run.setup.stage.evaluate(self._run)

    def table(self, results: Results) -> ResultTable:
        """Bits per byte on eval_tokens of each split; the same rows for any number of devices."""
        rows = []
        for split in ("train", "validation"):
            values = self._measure_split(split, results)
            rows.append(
                (split, f"{values['tokens']:,}", f"{values['bpb']:.6f}", f"{values['seconds']:.1f}")
            )
        return ResultTable("bits per byte", ("split", "tokens", "bpb", "seconds"), rows)

    def _measure_split(self, split: str, results: Results) -> dict[str, Any]:
        run, config = self._run, self._run.config
        count = eval_batches(config)
        measured_on = {
            "data": fingerprint.summary(fingerprint.contents_of_split(config, split)),
            "batches": [count, pyconfig.row_length(config)],
            **{key: config[key] for key in fingerprint.ROW_KEYS},
            **measured_with(run),
        }
        values = results.get(f"bpb {split}", measured_on)
        if values is not None:
            return values
        started = time.monotonic()

        def counted(batches) -> Iterator:
            for done, batch in enumerate(islice(batches, count)):
                run.progress(done, count)
                yield batch

        with stages.open_loader(run, split) as batches:
            bpb = bits_per_byte(stages.count_text_bits(run), counted(batches))
        values = {
            "bpb": bpb,
            "tokens": count * config.global_batch_tokens,
            "seconds": time.monotonic() - started,
        }
        results.put(f"bpb {split}", measured_on, values)
        return values
