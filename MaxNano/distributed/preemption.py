"""Preemption: a signal to stop, such as SIGTERM, ends a run after the current step, with a checkpoint.

So does an error of the data in one of several processes, which then all stop at the same step.
"""

import contextlib
import json
import os
import signal
import threading
import types
from collections.abc import Iterable, Iterator
from typing import Any, Self, TypeVar

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

from MaxNano import console
from MaxNano.distributed import runtime

Item = TypeVar("Item")

# SIGHUP: the terminal has closed. SIGUSR1 and SIGUSR2: SLURM, at the time before the end of the job
# that `--signal` sets.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the run is saved; the same command resumes it
LOOKAHEAD_BATCHES = 3  # that each of several processes must have ready; see HaltNotice
POLL_SECONDS = 1.0  # between looks for a notice
AGREE_SECONDS = 120  # until all processes must have read a notice


class Preempted(Exception):
    """The run must save a checkpoint and exit with EXIT_PREEMPTED."""


class Halted(Exception):
    """The run must save a checkpoint and end with `error`: the next step cannot be made."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


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
        self._notice: HaltNotice | None = None  # in a run of several processes

    def __enter__(self) -> Self:
        handler, numbers = self._handle, SIGNALS
        if jax.distributed.is_initialized():
            handler, numbers = _pass_on, SIGNALS[2:]
            self._notice = HaltNotice(distributed.global_state.client)
        for number in numbers:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._notice is not None:
            self._notice.close()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self, step: int | None = None) -> None:
        """Raises Preempted if a stop was requested, Halted if a process has given notice; cheap.

        step: the training step at a step boundary, in the same order in every process; None
        elsewhere. Several processes cannot agree between boundaries: they stop at the next one.
        """
        if self._notice is not None and step is not None:
            self._notice.check(step)
        if jax.distributed.is_initialized():
            requested = step is not None and multihost_utils.reached_preemption_sync_point(step)
        else:
            requested = self._requested
        if requested:
            raise Preempted

    def check_batches(self, step: int, ready: int | None, error: Exception | None) -> None:
        """Of several processes, each calls it before it takes the batch of `step`.

        ready: the number of batches that it has, and why no further one can be made; None if
        nothing is in the way. Raises Halted, in all processes at the same step, before the first
        batch that is missing in one of them.
        """
        self._notice.check_batches(step, ready, error)

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


# ---- Several processes --------------------------------------------------------------------------


class HaltNotice:
    """Stops all processes at the same step when one of them will miss a batch.

    A process without a batch cannot tell the others by a collective operation: they wait for it in
    the next step already. So it gives notice LOOKAHEAD_BATCHES steps before, through the
    coordinator's key-value store, and does not start its step s before all processes have read the
    notice. A process reads the metrics of a step after it has started the next one, so the others
    have started s + 1 at most, and all stop at s + 2. Another process that runs out of data at the
    same time, at most one step behind, has batches for the steps before s + 2 too.

    client: that of jax.distributed. `close` ends the thread that listens.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._halt: tuple[int, str] | None = None  # step, problem
        self._error: Exception | None = None  # of this process
        self._has_compared = False
        self._is_agreed, self._wake, self._is_closing = threading.Event(), threading.Event(), False
        self._listener = threading.Thread(target=self._listen, name="halt-notice", daemon=True)
        self._listener.start()

    def check(self, step: int) -> None:
        """Raises Halted if all processes stop at `step`: with the error of this process, or else
        ValueError with the other one's.
        """
        if self._halt is not None and step >= self._halt[0]:
            raise Halted(self._error or ValueError(self._halt[1]))

    def check_batches(self, step: int, ready: int | None, error: Exception | None) -> None:
        """As Preemption.check_batches. Raises `error` itself if another process does not answer."""
        problem = None
        if ready is not None:
            self._error = error
            problem = f"process {jax.process_index()}: {console.one_line(error)}"
        if not self._has_compared:  # before the first step, all are at the same point
            self._has_compared = True
            shortages = [each for each in runtime.gather_json((ready, problem)) if each[1]]
            if shortages:
                ready, problem = min(shortages)
                self._halt = (step + ready, problem)
        elif problem is not None and self._halt is None and ready <= LOOKAHEAD_BATCHES:
            self._give(step + LOOKAHEAD_BATCHES - 1, problem)
        self.check(step)

    def close(self) -> None:
        """End the thread, unless it waits for a process that does not answer."""
        self._is_closing = True
        self._wake.set()
        self._listener.join(2 * POLL_SECONDS)

    def _give(self, step: int, problem: str) -> None:
        with contextlib.suppress(RuntimeError):  # another process was first
            self._client.key_value_set(_HALT, json.dumps((step, problem)))
        self._wake.set()
        if not self._is_agreed.wait(AGREE_SECONDS):
            raise self._error

    def _listen(self) -> None:
        """In the thread: wait for a notice, and until all processes have read it."""
        while True:
            self._wake.wait(POLL_SECONDS)
            if self._is_closing:
                return
            self._wake.clear()
            try:
                step, problem = json.loads(self._client.key_value_try_get(_HALT))
            except RuntimeError:  # there is none
                continue
            self._halt = (step, problem)
            with contextlib.suppress(RuntimeError):  # a process does not answer
                self._client.wait_at_barrier(_HALT, round(1000 * AGREE_SECONDS))
                self._is_agreed.set()
            return


_HALT = "maxnano/halt"
