"""EVALS: the evaluations that train.py measures at intervals and evaluate.py on a checkpoint.

A new evaluation is a class that follows Eval, and a row of EVALS.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from ml_collections import FrozenConfigDict

from MaxNano.evals.bpb import BpbEval
from MaxNano.evals.chat import ChatEval
from MaxNano.evals.core import CoreEval
from MaxNano.evals.results import Results, ResultTable
from MaxNano.evals.samples import SamplesEval
from MaxNano.training.context import RunContext


class Eval(Protocol):
    """An evaluation of one run.

    It is opened at the start, before the run's state exists, so that missing data are an error
    then. An evaluation in several parts keeps each in `results`; when it is resumed it does the
    others.
    """

    event: str  # the name of its rows in metrics.jsonl
    at_start: bool  # whether training measures it before the first step too

    def __init__(self, run: RunContext):
        """Raises ValueError if its data are missing or wrong."""

    @staticmethod
    def interval(config: FrozenConfigDict) -> int:
        """Training steps between two measurements, 0 for none. The last step is measured too."""

    def measure(self, results: Results) -> dict[str, float | str]:
        """{metric: value} of the run's current parameters, for metrics.jsonl."""

    def table(self, results: Results) -> ResultTable:
        """Measure, and show the details."""


# By the name that the config key `evals` takes. Training measures them in this order.
EVALS: dict[str, type[Eval]] = {
    "bpb": BpbEval,  # what the stage validates with; event "validation"
    "samples": SamplesEval,
    "core": CoreEval,
    "chat": ChatEval,
}

# Checkpoints written before `measured_steps` existed have these keys.
_OLD_KEYS = {
    "bpb": "evaluated_step",
    "samples": "evaluated_step",
    "core": "core_step",
    "chat": "chat_step",
}


def measured_steps(extra: Mapping[str, Any]) -> dict[str, int | None]:
    """{evaluation: step of its latest measurement}, from what was saved with a checkpoint."""
    if "measured_steps" in extra:
        return dict(extra["measured_steps"])
    return {name: extra.get(key) for name, key in _OLD_KEYS.items()}


def open_evals(run: RunContext) -> dict[str, Eval]:
    """The evaluations that a training run measures at intervals."""
    return {name: row(run) for name, row in EVALS.items() if row.interval(run.config)}


def is_due(evaluation: Eval, config: FrozenConfigDict, step: int) -> bool:
    """Whether training measures an evaluation before step `step`; config.steps stands for the end."""
    at_interval = step % evaluation.interval(config) == 0
    return step >= config.steps or (at_interval and (step > 0 or evaluation.at_start))
