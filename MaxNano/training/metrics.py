"""Metrics of a run: from the arrays of a train step to the step line and the rows of metrics.jsonl.

The metrics of a step are read one step late, when the next one has been dispatched, so that the
host never waits for the device and the device never for the host. Nothing here can stop or delay
training: files and trackers are written by threads (metric_files.py).
"""

import contextlib
import math
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import FrozenConfigDict

from MaxNano.training.display import FIRST_TIMED_STEP, Display, event_lines
from MaxNano.training.metric_files import MetricFiles

SMOOTHING = 0.9  # of `smoothed_loss` and of the time per step behind `seconds_left`
CLOCK_SECONDS = 1e-6  # no step counts as shorter


class MetricLogger:
    """Prints and writes what happens in the run in `directory` (local or gs://).

    total_steps: steps of the whole run; start_step: the first step of this process.
    tokens_per_step, flops_per_token, peak_flops (of all devices, None if unknown): for tokens/s,
    TFLOP/s and MFU. Only the process with `is_main` prints and writes; the others compute the same numbers.
    state: what `state()` returned when the checkpoint was saved that this process resumes from,
    None for a new run.
    """

    def __init__(
        self,
        config: FrozenConfigDict,
        directory: epath.PathLike,
        *,
        total_steps: int,
        start_step: int,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float | None,
        is_main: bool = True,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        state = state or {
            "run_id": uuid.uuid4().hex[:12],
            "rows": 0,
            "loss_average": _Average().state(),
            "lowest_validation_bpb": None,
            "skipped": 0,
            "training_seconds": 0.0,
            "elapsed_seconds": 0.0,
        }
        self._start_step = self._next_step = start_step
        self._total_steps = total_steps
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._log_interval = config.log_interval
        self._run_id = state["run_id"]
        self._loss = _Average(*state["loss_average"])
        self._lowest_bpb = state["lowest_validation_bpb"]
        self._skipped = state["skipped"]
        self._training_seconds = state["training_seconds"]
        self._seconds_before = state["elapsed_seconds"]  # of earlier processes
        self._step_seconds = _Average()
        self._waited_seconds = 0.0  # for batches, since the last row
        self._dispatching: float | None = None  # when the wait for the latest batch ended
        self._started = self._clock = time.monotonic()
        self._pending: _Pending | None = None
        self._arrived: dict[str, float] | None = None
        self._display = Display(total_steps, start_step) if is_main else None
        self._files = MetricFiles(config, directory, state, next_step=start_step, is_main=is_main)

    @property
    def run_id(self) -> str:
        """The id of the run, the same in all of its processes."""
        return self._run_id

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The wait for the batch of the next step, which `step` takes when it is dispatched.

        A pending step that is done by then ends with the wait: the device had nothing else to do.
        """
        began = time.monotonic()
        try:
            yield
        finally:
            self._dispatching = time.monotonic()
            self._waited_seconds += self._dispatching - began
            if self._pending is not None and _are_ready(self._pending.metrics):
                self._pending = self._pending._replace(done=self._dispatching)

    def step(
        self, step: int, device_metrics: Mapping[str, Any], position: Mapping[str, int]
    ) -> dict[str, float] | None:
        """Take the metrics of `step`, just dispatched; return those of the step before.

        device_metrics: scalars by name, possibly jax arrays that are still being computed; `loss`
        is smoothed too, `skipped` (1 if the update was skipped) is counted. position:
        the step's position in the data, for the step line. Returns the metrics of the latest step
        that has arrived and was not returned before, None if there is none.
        """
        # Some backends return only when the step is done: then it ended now, not when it is read,
        # and the step before it ended before.
        done = time.monotonic() if _are_ready(device_metrics) else None
        if done is not None and self._pending is not None and self._pending.done is None:
            self._pending = self._pending._replace(done=self._dispatching)
        self._read_pending()
        self._pending = _Pending(step, dict(device_metrics), dict(position), done)
        arrived, self._arrived = self._arrived, None
        return arrived

    def flush(self) -> None:
        """Wait for the pending step, write it, and restart the clock of the next one.

        Call it before and after work other than training (evaluation, saving), so that its time
        counts in no step.
        """
        self._read_pending()
        self._clock = time.monotonic()

    def event(self, step: int, name: str, values: Mapping[str, float | str]) -> None:
        """Print and write the results of `name` (an evaluation, samples) after `step` steps."""
        self.flush()
        values = {
            key: value if isinstance(value, str) else float(value) for key, value in values.items()
        }
        if name == "validation" and "bpb" in values:
            known = [self._lowest_bpb] if self._lowest_bpb is not None else []
            self._lowest_bpb = min([values["bpb"], *known])
            values["lowest_bpb"] = self._lowest_bpb
        self._files.write({"step": step, "event": name, **values})
        if self._display:
            self._display.print(event_lines(step, name, values))
        self._clock = time.monotonic()

    def message(self, text: str) -> None:
        """Print a line that is written to no file."""
        if self._display:
            self._display.print([text])

    def state(self) -> dict[str, Any]:
        """The state from which a later process continues as if this one had not stopped; JSON-able."""
        self.flush()
        return {
            "run_id": self._run_id,
            **self._files.state(self._next_step),
            "loss_average": self._loss.state(),
            "lowest_validation_bpb": self._lowest_bpb,
            "skipped": self._skipped,
            "training_seconds": self._training_seconds,
            "elapsed_seconds": self._elapsed(),
        }

    def close(self) -> None:
        """Write the remaining rows, within a time limit, and restore the terminal."""
        try:
            self._read_pending()
        finally:
            self._files.close()
            if self._display:
                self._display.close()

    def _read_pending(self) -> None:
        if self._pending is None:
            return
        step, metrics, position, done = self._pending
        self._pending = None
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if done is None:
            done = time.monotonic()
        seconds, self._clock = max(done - self._clock, CLOCK_SECONDS), done
        self._arrived = metrics
        row = self._row(step, metrics, position, seconds)
        self._files.write(row)
        self._next_step = step + 1
        ends = (self._start_step, self._total_steps - 1)
        if self._display and (step in ends or step % self._log_interval == 0):
            self._display.show_step(row, position)

    def _row(
        self, step: int, metrics: dict[str, float], position: Mapping[str, int], seconds: float
    ) -> dict[str, Any]:
        """The row of metrics.jsonl for a step that took `seconds`."""
        if "loss" in metrics and math.isfinite(metrics["loss"]):
            self._loss.add(metrics["loss"])
        self._skipped += int(metrics.get("skipped", 0))
        if step != self._start_step:  # the first step of a process compiles
            self._step_seconds.add(seconds)
            if step >= FIRST_TIMED_STEP:
                self._training_seconds += seconds
        waited_seconds, self._waited_seconds = self._waited_seconds, 0.0
        tokens_per_second = self._tokens_per_step / seconds
        row = {
            "step": step,
            **metrics,
            "smoothed_loss": self._loss.value(),
            "skipped_in_all": self._skipped,
            "milliseconds": 1e3 * seconds,
            "batch_wait_milliseconds": 1e3 * waited_seconds,
            "tokens_per_second": tokens_per_second,
        }
        flops = tokens_per_second * self._flops_per_token
        row["tflops_per_second"] = flops / 1e12  # of all devices
        if self._peak_flops:
            row["mfu"] = flops / self._peak_flops
        row |= position
        row["training_seconds"] = self._training_seconds
        row["elapsed_seconds"] = self._elapsed()
        average = self._step_seconds.value()
        row["seconds_left"] = None if average is None else average * (self._total_steps - 1 - step)
        return row

    def _elapsed(self) -> float:
        return self._seconds_before + time.monotonic() - self._started


class _Pending(NamedTuple):
    """A step whose metrics have not been read."""

    step: int
    metrics: dict[str, Any]
    position: dict[str, int]
    done: float | None  # time of its end, None if it had not ended when it was handed over


def _is_ready(value: Any) -> bool:
    return not isinstance(value, jax.Array) or value.is_ready()


def _are_ready(metrics: Mapping[str, Any]) -> bool:
    return all(map(_is_ready, metrics.values()))


class _Average:
    """Exponential moving average, corrected for its start at zero."""

    def __init__(self, total: float = 0.0, weight: float = 0.0) -> None:
        self._total = total
        self._weight = weight

    def add(self, value: float) -> None:
        self._total = SMOOTHING * self._total + (1 - SMOOTHING) * value
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)

    def value(self) -> float | None:
        return self._total / self._weight if self._weight else None

    def state(self) -> list[float]:
        return [self._total, self._weight]
