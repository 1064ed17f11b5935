"""Preemption: a signal to stop, such as SIGTERM, ends a run after the current step, with a checkpoint."""

import contextlib
import os
import signal
import types
from collections.abc import Iterable, Iterator
from typing import Self, TypeVar

import jax
from jax.experimental import multihost_utils

Item = TypeVar("Item")

# SIGHUP: the terminal has closed. SIGUSR1 and SIGUSR2: SLURM, at the time before the end of the job
# that `--signal` sets.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the run is saved; the same command resumes it


class Preempted(Exception):
    """The run must save a checkpoint and exit with EXIT_PREEMPTED."""


class Preemption:
    """Catches SIGNALS, and raises Preempted at the next check.

        with Preemption() as preemption:
            for step in ...:
                preemption.check(step)
                ...
                for batch in preemption.checked(validation_batches): ...
                with preemption.at_once():
                    ...  # a long wait that may be interrupted anywhere

    A second Ctrl-C ends the process immediately. SIGHUP stays ignored under nohup. In a run of
    several processes they all stop at the same step by JAX's preemption notice, which SIGTERM to
    any of them sets off; SIGHUP, SIGUSR1 and SIGUSR2 are passed on as SIGTERM.
    """

    def __init__(self) -> None:
        self._requested = self._at_once = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        handler, numbers = self._handle, SIGNALS
        if jax.distributed.is_initialized():
            handler, numbers = _pass_on, SIGNALS[2:]
        for number in numbers:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, handler)
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
            with contextlib.suppress(OSError):  # the terminal may have closed
                os.write(2, b"\nStopping after this step to save a checkpoint; Ctrl-C stops now\n")
        self._requested = True
        # The system's handler also works while the process is inside a long compilation.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._at_once:
            raise Preempted


def _pass_on(number: int, frame: types.FrameType | None) -> None:
    signal.raise_signal(signal.SIGTERM)
