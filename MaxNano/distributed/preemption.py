"""Preemption: SIGTERM and Ctrl-C stop a run after the current step, with a checkpoint."""

import contextlib
import os
import signal
import types
from collections.abc import Iterable, Iterator
from typing import Self, TypeVar

import jax
from jax.experimental import multihost_utils

Item = TypeVar("Item")

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the run is saved; the same command resumes it


class Preempted(Exception):
    """The run must save a checkpoint and exit with EXIT_PREEMPTED."""


class Preemption:
    """Catches SIGTERM and Ctrl-C, and raises Preempted at the next check.

        with Preemption() as preemption:
            for step in ...:
                preemption.check(step)
                ...
                for batch in preemption.checked(validation_batches): ...
                with preemption.at_once():
                    ...  # a long wait that may be interrupted anywhere

    A second Ctrl-C ends the process immediately. A run of several processes uses JAX's preemption
    notice instead of the signals, so that all processes stop at the same step.
    """

    def __init__(self) -> None:
        self._requested = self._at_once = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if not jax.distributed.is_initialized():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self, step: int | None = None) -> None:
        """Raises Preempted if a stop was requested; cheap.

        step: the training step at a step boundary, in the same order in every process; None
        elsewhere. Several processes cannot agree between boundaries: they stop at the next one.
        """
        if jax.distributed.is_initialized():
            requested = step is not None and multihost_utils.reached_preemption_sync_point(step)
        else:
            requested = self._requested
        if requested:
            raise Preempted

    def checked(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items, with a check before each."""
        for item in items:
            self.check()
            yield item

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside the block, the signal itself raises Preempted, without waiting for a check.

        Has no effect in a run of several processes: one process cannot stop alone.
        """
        self._at_once = True
        try:
            if self._requested:
                raise Preempted
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if not self._requested:
            # Not print(): the signal may interrupt another print.
            os.write(2, b"\nStopping after this step to save a checkpoint; Ctrl-C stops now\n")
        self._requested = True
        # The system's handler also works while the process is inside a long compilation.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._at_once:
            raise Preempted
