"""RunContext: the run that stages and evaluations receive."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
from etils import epath
from jax.sharding import NamedSharding
from ml_collections import FrozenConfigDict

from MaxNano.distributed import runtime, sharding
from MaxNano.inference import prefix_scoring
from MaxNano.storage.files import run_directory
from MaxNano.tokenization.tokenizer import Tokenizer
from MaxNano.training import stages
from MaxNano.training.setup import RunSetup
from MaxNano.training.stages import BatchStream
from MaxNano.training.state import TrainState
from MaxNano.training.step import RunPrograms
from MaxNano.training.validation import PackedRows, tell_if_long


def say(line: str) -> None:
    """Print a line on the first process."""
    if jax.process_index() == 0:
        print(line, flush=True)


def _ignore_progress(done: int | None = None, total: int | None = None) -> None:
    pass


@dataclass
class RunContext:
    """A run's set-up, its current state and the programs that compute with it.

    Stages and evaluations call `progress` between pieces of long work. In training it raises
    Preempted if the process has to stop; in evaluate.py it advances a progress bar.
    """

    setup: RunSetup
    tokenizer: Tokenizer
    is_training: bool = False
    say: Callable[[str], None] = say
    progress: Callable[..., None] = _ignore_progress  # (done, total), both may be left out
    # A context in which a stop request interrupts at once, for waits of unknown length.
    at_once: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    # Set before the first batch.
    state: TrainState = field(init=False)
    programs: RunPrograms = field(init=False)
    batches: BatchStream = field(init=False)

    @property
    def config(self) -> FrozenConfigDict:
        return self.setup.config

    @property
    def params(self) -> dict[str, Any]:
        """The parameters after the latest step."""
        return self.state.params

    @property
    def directory(self) -> epath.Path:
        """The run's folder."""
        return run_directory(self.config)

    @property
    def rows_sharding(self) -> NamedSharding:
        """The sharding of a batch's arrays."""
        return sharding.batch_sharding(self.setup.mesh, self.config.logical_axis_rules)

    @cached_property
    def scorer(self) -> prefix_scoring.PrefixScorer:
        """Scores continuations of shared prefixes; its programs are compiled once for all users."""
        return prefix_scoring.PrefixScorer(self.setup, self.tokenizer.bos_id)

    @cached_property
    def held_out(self) -> PackedRows:
        """The validation batches: config.eval_tokens, rounded down to whole batches, at least one.

        Raises an error of the data in all processes.
        """
        rows, failure = None, None
        try:
            with self.at_once(), stages.open_loader(self, "validation") as batches:
                count, what = eval_batches(self.config), "Packing the validation data"
                told = tell_if_long(batches, count, what, self.say)
                rows = PackedRows(told, count, self.config.vocab_size)
        except (ValueError, OSError, RuntimeError) as error:
            failure = error
        runtime.raise_together(failure)
        return rows


def eval_batches(config: FrozenConfigDict) -> int:
    """Number of batches in config.eval_tokens, at least one."""
    return max(1, config.eval_tokens // config.global_batch_tokens)
