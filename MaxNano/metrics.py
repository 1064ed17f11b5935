"""Metrics of a run: the step line, a live display, metrics.jsonl, TensorBoard and optional trackers.

Numbers of a step are read one step late, when the next one is already under way, so that the host
never waits for the device and the device never for the host. Nothing here can stop training: where
a curve or a tracker fails, one warning is printed and the run goes on without it.
"""

import json
import math
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import logging
from etils import epath
from ml_collections import FrozenConfigDict
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from MaxNano import pyconfig

# Steps before this one count in no total of time: they compile and warm up. The number is
# nanochat's, so that training_seconds of both can be compared.
# Source: nanochat/scripts/base_train.py@92d63d4.
FIRST_TIMED_STEP = 11
SMOOTHING = 0.9  # of the loss and of the step's time that the step line shows
REMOTE_WRITE_SECONDS = 60.0  # between rewrites of a metrics.jsonl that cannot be appended to
PLAIN_WIDTH = 120  # columns of a table where no terminal says how wide it is


class MetricLogger:
    """Writes what happens in the run kept in `directory` (local or gs://).

    total_steps: steps of the whole run; start_step: the first one of this process.
    tokens_per_step, flops_per_token, peak_flops (of all devices, None if unknown): for tokens/s and
    MFU. Only the process with `is_main` prints and writes; the others fetch and count alike, so
    that all of them see the same numbers. state: what `state()` gave when the checkpoint was
    saved that this process goes on from, None for a new run. Rows that a killed run wrote to
    metrics.jsonl after that checkpoint are cut off: their steps are done again.
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
        self._start_step = start_step
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
        self._seconds_before = state["elapsed_seconds"]
        self._step_seconds = _Average()
        self._started = self._clock = time.monotonic()
        self._pending: _Pending | None = None
        self._arrived: dict[str, float] | None = None
        self._display = _Display(total_steps, start_step) if is_main else None
        self._rows_before = state["rows"]
        self._jsonl: _Jsonl | None = None
        self._sinks: dict[str, Any] = {}
        if is_main:
            self._open_sinks(config, epath.Path(directory).expanduser(), start_step)

    def step(
        self, step: int, device_metrics: Mapping[str, Any], position: Mapping[str, int]
    ) -> dict[str, float] | None:
        """Take in the metrics of `step`, just dispatched; give out those of the step before.

        device_metrics: scalars by name, jax arrays still being computed among them; `loss` is
        smoothed for the step line, `skipped` (1 where the update was) is counted. position: where
        in the data the step is, for the step line. Returns the numbers of the latest step that has
        arrived and was not returned before, None if there is none.
        """
        # Some backends return only when the step is done: then it ended now, not when it is read.
        done = time.monotonic() if all(map(_is_ready, device_metrics.values())) else None
        self._read_pending()
        self._pending = _Pending(step, dict(device_metrics), dict(position), done)
        arrived, self._arrived = self._arrived, None
        return arrived

    def flush(self) -> None:
        """Wait for the step under way, write it, and start the clock of the next one.

        To be called before and after what is no training (evaluation, saving), so that its time is
        in no step's.
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
        self._write({"step": step, "event": name, **values})
        if self._display:
            self._display.print(_event_lines(step, name, values))
        self._clock = time.monotonic()

    def message(self, text: str) -> None:
        """Print a line that is in no file."""
        if self._display:
            self._display.print([text])

    def state(self) -> dict[str, Any]:
        """What a later process needs to go on as if this one had never stopped; JSON-able."""
        self.flush()
        return {
            "run_id": self._run_id,
            "rows": self._jsonl.rows if self._jsonl else self._rows_before,
            "loss_average": self._loss.state(),
            "lowest_validation_bpb": self._lowest_bpb,
            "skipped": self._skipped,
            "training_seconds": self._training_seconds,
            "elapsed_seconds": self._elapsed(),
        }

    def close(self) -> None:
        """Write what is left. The display leaves the terminal as it found it."""
        try:
            self._read_pending()
        finally:
            for name in list(self._sinks):
                self._try(name, self._sinks[name].finish)
            self._sinks = {}
            if self._display:
                self._display.close()

    # ---- One step

    def _read_pending(self) -> None:
        if self._pending is None:
            return
        step, metrics, position, done = self._pending
        self._pending = None
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if done is None:
            done = time.monotonic()
        seconds, self._clock = max(done - self._clock, 1e-9), done
        self._arrived = metrics
        row = self._row(step, metrics, position, seconds)
        self._write(row)
        if self._display:
            self._display.step(row, print_line=self._is_shown(step))

    def _is_shown(self, step: int) -> bool:
        ends = (self._start_step, self._total_steps - 1)
        return step in ends or (step + 1) % self._log_interval == 0

    def _row(
        self, step: int, metrics: dict[str, float], position: Mapping[str, int], seconds: float
    ) -> dict[str, Any]:
        """The row of metrics.jsonl for a step that took `seconds`."""
        if "loss" in metrics and math.isfinite(metrics["loss"]):
            self._loss.add(metrics["loss"])
        self._skipped += int(metrics.get("skipped", 0))
        if step != self._start_step:  # the first one of a process compiles
            self._step_seconds.add(seconds)
            if step >= FIRST_TIMED_STEP:
                self._training_seconds += seconds
        rate = self._tokens_per_step / seconds
        row = {
            "step": step,
            **metrics,
            "smoothed_loss": self._loss.value(),
            "skipped_in_all": self._skipped,
            "milliseconds": 1e3 * seconds,
            "tokens_per_second": rate,
        }
        if self._peak_flops:
            row["mfu"] = rate * self._flops_per_token / self._peak_flops
        row |= position
        row["training_seconds"] = self._training_seconds
        row["elapsed_seconds"] = self._elapsed()
        left = self._step_seconds.value()
        row["seconds_left"] = None if left is None else left * (self._total_steps - 1 - step)
        return row

    def _elapsed(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    # ---- Files and trackers

    def _open_sinks(self, config: FrozenConfigDict, directory: epath.Path, start_step: int) -> None:
        self._jsonl = self._open(
            "metrics.jsonl",
            lambda: _Jsonl(
                directory / "metrics.jsonl",
                keep=self._rows_before,
                append="://" not in str(directory),
            ),
        )
        if config.tensorboard:
            self._open("tensorboard", lambda: _TensorBoard(directory / "tensorboard", start_step))
        for name in config.trackers:
            self._open(name, lambda name=name: TRACKERS[name](config, directory, self._run_id))

    def _open(self, name: str, opener: Callable[[], Any]) -> Any:
        sink = self._try(name, opener)
        if sink is not None:
            self._sinks[name] = sink
        return sink

    def _write(self, row: dict[str, Any]) -> None:
        """Hand a row to every sink; a tracker gets its finite numbers, named by where they belong."""
        prefix = row.get("event", "train")
        numbers = {
            f"{prefix}/{key}": value
            for key, value in row.items()
            if key != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        for name, sink in list(self._sinks.items()):
            if sink is self._jsonl:
                self._try(name, lambda: self._jsonl.log(row))
            elif numbers:
                self._try(name, lambda sink=sink: sink.log(numbers, step=row["step"]))

    def _try(self, name: str, call: Callable[[], Any]) -> Any:
        """The call's result; where it fails, a warning, and `name` is not tried again."""
        try:
            return call()
        except Exception as error:  # whatever a tracker throws, training goes on
            self._sinks.pop(name, None)
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            logging.warning("%s is off for the rest of this run (%s)", name, reason)
            return None


class _Pending(NamedTuple):
    """A step whose numbers have not been read."""

    step: int
    metrics: dict[str, Any]
    position: dict[str, int]
    done: float | None  # when it ended, None where it had not yet when it was handed over


def _is_ready(value: Any) -> bool:
    return not isinstance(value, jax.Array) or value.is_ready()


class _Average:
    """Exponential moving average without the pull of its start towards zero."""

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


# ---- Where rows go ------------------------------------------------------------------------------


class _Jsonl:
    """A file with one JSON object a line, of which the first `keep` lines are kept.

    A line that is no object, such as the torn last one of a killed process, ends what is kept.
    Where `append` is not to be had, as on an object store, the file is written anew now and then.
    """

    def __init__(self, path: epath.Path, *, keep: int, append: bool) -> None:
        self._path = path
        self._lines = _whole_lines(path.read_text() if path.exists() else "")[:keep]
        self.rows = len(self._lines)
        self._written = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rewrite()
        self._file = path.open("a") if append else None
        if self._file:
            self._lines = []

    def log(self, row: Mapping[str, Any]) -> None:
        # JSON has no word for nan and infinity.
        row = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        line = json.dumps(row) + "\n"
        if self._file:
            self._file.write(line)
            self._file.flush()
        else:
            self._lines.append(line)
            if time.monotonic() - self._written > REMOTE_WRITE_SECONDS:
                self._rewrite()
        self.rows += 1

    def finish(self) -> None:
        if self._file:
            self._file.close()
        else:
            self._rewrite()

    def _rewrite(self) -> None:
        temporary = self._path.parent / (self._path.name + ".tmp")
        temporary.write_text("".join(self._lines))
        temporary.replace(self._path)
        self._written = time.monotonic()


def _whole_lines(text: str) -> list[str]:
    """The lines of `text`, up to the first that is no JSON object."""
    lines = []
    for line in text.splitlines(keepends=True):
        try:
            if not line.endswith("\n") or not isinstance(json.loads(line), dict):
                break
        except ValueError:
            break
        lines.append(line)
    return lines


class _TensorBoard:
    """TensorBoard curves; what a killed run drew from `start_step` on is hidden."""

    def __init__(self, directory: epath.Path, start_step: int) -> None:
        import tensorboardX

        self._writer = tensorboardX.SummaryWriter(str(directory), purge_step=start_step)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


def _start_wandb(config: FrozenConfigDict, directory: epath.Path, run_id: str) -> Any:
    import wandb

    return wandb.init(
        project=config.tracker_project,
        name=config.run_name,
        id=run_id,
        resume="allow",
        dir=None if "://" in str(directory) else str(directory),
        config=_plain(config),
    )


def _start_trackio(config: FrozenConfigDict, directory: epath.Path, run_id: str) -> Any:
    import trackio

    return trackio.init(
        project=config.tracker_project,
        name=f"{config.run_name}-{run_id}",  # a name stands for one run there
        resume="allow",
        config=_plain(config),
    )


def _plain(config: FrozenConfigDict) -> dict[str, Any]:
    """The config as the user would write it."""
    return {key: value for key, value in config.to_dict().items() if key != pyconfig.ORIGIN}


# Name in config.trackers -> opener of an object with log(numbers, step=) and finish().
TRACKERS: dict[str, Callable[[FrozenConfigDict, epath.Path, str], Any]] = {
    "wandb": _start_wandb,
    "trackio": _start_trackio,
}


# ---- What the user sees -------------------------------------------------------------------------


class _Display:
    """Lines on stdout; on a terminal, the latest step stays below them with a progress bar."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self._total_steps = total_steps
        self._console = Console(highlight=False)
        self._progress = None
        if self._console.is_terminal:
            self._progress = Progress(
                BarColumn(bar_width=16, table_column=Column(min_width=16)),
                TextColumn("{task.description}", markup=False, table_column=Column()),  # may wrap
                console=self._console,
                auto_refresh=False,  # redrawn when there is news, by no thread that takes a core's time
            )
            self._task = self._progress.add_task("", total=total_steps, completed=start_step)
            self._progress.start()

    def step(self, row: Mapping[str, Any], *, print_line: bool) -> None:
        if not print_line:
            return
        line = _step_line(row, self._total_steps)
        if self._progress:
            self._progress.update(
                self._task, completed=row["step"] + 1, description=line, refresh=True
            )
        else:
            print(line, flush=True)

    def print(self, lines: Iterable[str]) -> None:
        for line in lines:
            if self._progress:
                self._console.print(Text(line))
            else:
                print(line, flush=True)

    def close(self) -> None:
        if self._progress:
            self._progress.stop()


def _step_line(row: Mapping[str, Any], total_steps: int) -> str:
    """The row of a step, for people; a step of a 500-step run is `step 500/500` when it is done."""
    parts = [f"step {row['step'] + 1:>{len(str(total_steps))}}/{total_steps}"]
    if row["smoothed_loss"] is not None:
        parts.append(f"loss {row['smoothed_loss']:.4f}")
    if "bpb" in row:
        parts.append(f"bpb {row['bpb']:.4f}")
    if "reward" in row:
        parts.append(f"reward {row['reward']:.3f}")
    if "lr_multiplier" in row:
        parts.append(f"lr x{row['lr_multiplier']:.2f}")
    parts.append(f"{row['milliseconds']:,.0f} ms")
    parts.append(f"{row['tokens_per_second']:,.0f} tok/s")
    if "mfu" in row:
        parts.append(f"MFU {100 * row['mfu']:.1f}%")
    if row["skipped_in_all"]:
        parts.append(f"skipped {row['skipped_in_all']}")
    place = [
        f"{key.replace('_', ' ')} {row[key]}"
        for key in ("epoch", "file", "row_group", "conversation", "conversations_cut", "conversations_left_out")
        if key in row
    ]
    if place:
        parts.append(" ".join(place))
    times = _duration(row["elapsed_seconds"])
    if row["seconds_left"] is not None:
        times += f", {_duration(row['seconds_left'])} left"
    return " | ".join([*parts, times])


def _event_lines(step: int, name: str, values: Mapping[str, float | str]) -> list[str]:
    """The numbers of an event on one line, each of its texts on a line of its own."""
    numbers = [
        f"{key.replace('_', ' ')} {value:.6g}"
        for key, value in values.items()
        if not isinstance(value, str)
    ]
    lines = [f"{name} after step {step}: {', '.join(numbers)}".rstrip(": ")]
    for key, value in values.items():
        if isinstance(value, str):
            lines.append("  " + f"{key} ->{value}".replace("\n", "\\n"))
    return lines


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table on stdout; cells may be of any type."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    table = Table(
        title=Text(title), title_justify="left", box=None, pad_edge=False, header_style="bold"
    )
    for name in header:
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    with console.capture() as capture:
        console.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()), end="\n\n", flush=True)
