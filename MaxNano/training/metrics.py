"""Metrics of a run: the step line, a live display, metrics.jsonl, TensorBoard and optional trackers.

Numbers of a step are read one step late, when the next one is already under way, so that the host
never waits for the device and the device never for the host. Nothing here can stop or delay
training: files and trackers are written by threads of their own. Where a file cannot be written,
one warning is printed and its rows wait for the next attempt; where a tracker fails, one warning is
printed and the run continues without it.
"""

import contextlib
import json
import math
import os
import queue
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging
from etils import epath
from ml_collections import FrozenConfigDict
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from MaxNano import pyconfig
from MaxNano.storage import files, remote

# Steps before this one count in no total of time: they compile and warm up. The number is
# nanochat's, so that training_seconds of both can be compared.
# Source: nanochat/scripts/base_train.py@92d63d4.
FIRST_TIMED_STEP = 11
SMOOTHING = 0.9  # of the loss and of the step's time that the step line shows
# An object store cannot append: the whole file is uploaded again, so often, and less often where that
# would take more than MAX_UPLOAD_SHARE of the time.
REMOTE_WRITE_SECONDS = 60.0
MAX_UPLOAD_SHARE = 0.05
CURVES_WRITE_SECONDS = 5.0  # between writes of a local TensorBoard file
UPLOAD_TIMEOUT_SECONDS = 60.0
RETRY_SECONDS = 15.0  # after a failed write
CLOSE_TIMEOUT_SECONDS = 30.0  # the end of a run waits this long for all files and trackers together
MAX_TRACKER_ROWS = 10_000  # that a tracker may be behind before it is switched off


class MetricLogger:
    """Writes what happens in the run kept in `directory` (local or gs://).

    total_steps: steps of the whole run; start_step: the first one of this process.
    tokens_per_step, flops_per_token, peak_flops (of all devices, None if unknown): for tokens/s and
    MFU. Only the process with `is_main` prints and writes; the others fetch and count alike, so
    that all of them see the same numbers. state: what `state()` gave when the checkpoint was
    saved that this process resumes from, None for a new run. Rows that a killed run wrote to
    metrics.jsonl after that checkpoint are cut off: their steps are done again. Rows that it had
    not written when the checkpoint was saved are in `state` itself, and are written now.
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
            "unwritten": [],
            "events": [],
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
        self._kept_rows = state["rows"]  # of earlier processes, at the start of metrics.jsonl
        self._next_step = start_step
        # Entries are [time, row]; checkpoints of before these keys existed count written rows only.
        self._unwritten: list[_Entry] = state.get("unwritten", [])
        self._events: list[_Entry] = [  # see state()
            *state.get("events", []),
            *(entry for entry in self._unwritten if "event" in entry[1]),
        ]
        self._files: list[_GrowingFile] = []
        self._trackers: list[_Tracker] = []
        if is_main:
            self._open_sinks(config, epath.Path(directory).expanduser())

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
        """What a later process needs to go on as if this one had never stopped; JSON-able.

        It does not wait for files: `rows` counts the rows that all of them have, and the later rows
        are in `unwritten`. `events` has the written events of steps that TensorBoard will be told
        to forget, because their train rows come again.
        """
        self.flush()
        rows, unwritten = self._written()
        first_step = unwritten[0][1]["step"] if unwritten else self._next_step
        self._events = [entry for entry in self._events if entry[1]["step"] >= first_step]
        return {
            "run_id": self._run_id,
            "rows": rows,
            "unwritten": unwritten,
            "events": [entry for entry in self._events if entry not in unwritten],
            "loss_average": self._loss.state(),
            "lowest_validation_bpb": self._lowest_bpb,
            "skipped": self._skipped,
            "training_seconds": self._training_seconds,
            "elapsed_seconds": self._elapsed(),
        }

    def close(self) -> None:
        """Write what is left, for at most CLOSE_TIMEOUT_SECONDS, and leave the terminal clean."""
        try:
            self._read_pending()
        finally:
            sinks = [*self._files, *self._trackers]
            deadline = time.monotonic() + CLOSE_TIMEOUT_SECONDS
            for sink in sinks:
                sink.close()
            for sink in sinks:
                sink.join(max(0.0, deadline - time.monotonic()))
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
        self._next_step = step + 1
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

    def _open_sinks(self, config: FrozenConfigDict, directory: epath.Path) -> None:
        self._files = [_GrowingFile(directory / "metrics.jsonl", self._kept_lines, _json_line, 0.0)]
        if config.tensorboard:
            try:
                self._files.append(self._open_curves(directory / "tensorboard"))
            except ImportError as error:
                _warn_off("tensorboard", error)
        self._trackers = [
            _Tracker(name, lambda name=name: TRACKERS[name](config, directory, self._run_id))
            for name in config.trackers
        ]
        for entry in self._unwritten:
            for file in self._files:
                file.add(entry)

    def _open_curves(self, directory: epath.Path) -> "_GrowingFile":
        """This process's TensorBoard file.

        Its start hides what earlier processes drew from the first step on that comes again, and
        draws those events of these steps that do not come again.
        """
        head = _curves_head(
            min([self._next_step, *(entry[1]["step"] for entry in self._unwritten)])
        )
        head += b"".join(
            _curves_point(entry) for entry in self._events if entry not in self._unwritten
        )
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        return _GrowingFile(directory / name, lambda _: head, _curves_point, CURVES_WRITE_SECONDS)

    def _kept_lines(self, content: bytes) -> bytes:
        """The rows of earlier processes, of the content of metrics.jsonl."""
        lines = _whole_lines(content.decode(errors="replace"))[: self._kept_rows]
        self._kept_rows = len(lines)
        return "".join(lines).encode()

    def _written(self) -> tuple[int, list["_Entry"]]:
        """(number of rows that every file has, rows that come after them); asks for the latter to be written."""
        if not self._files:
            return self._kept_rows, self._unwritten
        states = [file.state() for file in self._files]
        for file in self._files:
            file.hurry()
        written, unwritten = min(states, key=lambda state: state[0])
        return self._kept_rows + written, unwritten

    def _write(self, row: dict[str, Any]) -> None:
        """Hand a row to the threads that write it."""
        # JSON has no word for nan and infinity.
        row = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        entry = [time.time(), row]
        if "event" in row:
            self._events.append(entry)
        for file in self._files:
            file.add(entry)
        if numbers := _numbers(row):
            for tracker in self._trackers:
                tracker.log(numbers, row["step"])


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row, named by where they belong."""
    prefix = row.get("event", "train")
    return {
        f"{prefix}/{key}": value
        for key, value in row.items()
        if key != "step" and isinstance(value, int | float)
    }


def _warn_off(name: str, error: Exception) -> None:
    logging.warning("%s is off for the rest of this run (%s)", name, _reason(error))


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class _Pending(NamedTuple):
    """A step whose numbers have not been read."""

    step: int
    metrics: dict[str, Any]
    position: dict[str, int]
    done: float | None  # when it ended, None where it had not yet when it was handed over


def _is_ready(value: Any) -> bool:
    return not isinstance(value, jax.Array) or value.is_ready()


class _Average:
    """Exponential moving average without the pull of its start toward zero."""

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


_Entry = list  # [time in seconds since 1970, row]


class _GrowingFile:
    """A file that a thread appends to, so that no disk and no object store can delay training.

    path: local or remote. make_head: from the content that the file has when the process starts (empty where there
    is none) to the part that stays. encode: an entry's bytes. interval_seconds: at most so often a local file is
    written; a remote one see REMOTE_WRITE_SECONDS.
    A failed write is a warning, its entries wait for the next attempt.
    """

    def __init__(
        self,
        path: epath.Path,
        make_head: Callable[[bytes], bytes],
        encode: Callable[["_Entry"], bytes],
        interval_seconds: float,
    ) -> None:
        self._path = path
        self._is_remote = files.is_remote(path)
        self._file = _RemoteFile(str(path)) if self._is_remote else _LocalFile(Path(path))
        self._make_head, self._encode, self._interval_seconds = make_head, encode, interval_seconds
        self._entries: list[_Entry] = []  # not written yet
        self._written = 0
        self._is_open = self._is_closing = False
        self._is_hurried = True  # the first attempt tells at once whether the file can be written
        self._due = 0.0
        self._error: Exception | None = None  # of the last attempt
        self._news = threading.Condition()  # guards all of the above
        self._thread = threading.Thread(target=self._work, name=path.name, daemon=True)
        self._thread.start()

    def add(self, entry: "_Entry") -> None:
        """Append an entry, some time later."""
        with self._news:
            self._entries.append(entry)
            self._news.notify()

    def state(self) -> tuple[int, list["_Entry"]]:
        """(number of entries in the file, entries that are not in it yet)."""
        with self._news:
            return self._written, list(self._entries)

    def hurry(self) -> None:
        """Write what there is soon."""
        with self._news:
            if self._entries:
                self._is_hurried = True
                self._news.notify()

    def close(self) -> None:
        """Write what is left, once."""
        with self._news:
            self._is_closing = True
            self._news.notify()

    def join(self, seconds: float) -> None:
        """Wait for close(); a warning where entries are left."""
        self._thread.join(seconds)
        _, left = self.state()
        if left:
            reason = _reason(self._error or TimeoutError("still being written"))
            logging.warning(
                "%s does not have the last %d rows (%s); those up to the last checkpoint are in it, start the same "
                "command again to write them",
                self._path,
                len(left),
                reason,
            )

    def _work(self) -> None:
        is_closing = False
        while not is_closing:
            with self._news:
                self._wait()
                entries, is_closing = list(self._entries), self._is_closing
                self._is_hurried = False
            started = time.monotonic()
            try:
                if not self._is_open:
                    self._file.open(self._make_head)
                    self._is_open = True
                self._file.append(b"".join(map(self._encode, entries)))
            except Exception as error:  # noqa: BLE001 (whatever a store throws, training continues)
                if self._error is None:
                    logging.warning(
                        "%s cannot be written now, training continues, its rows wait (%s)",
                        self._path,
                        _reason(error),
                    )
                self._error, pause = error, RETRY_SECONDS
            else:
                if self._error is not None:
                    logging.warning("%s is written again, nothing is missing", self._path)
                self._error, pause = None, self._interval_seconds
                if self._is_remote:
                    pause = max(
                        REMOTE_WRITE_SECONDS, (time.monotonic() - started) / MAX_UPLOAD_SHARE
                    )
                with self._news:
                    del self._entries[: len(entries)]
                    self._written += len(entries)
            self._due = time.monotonic() + pause

    def _wait(self) -> None:
        """Until there is something to write and it is time to; called with the lock."""
        while not self._is_closing:
            seconds = 0.0 if self._is_hurried else self._due - time.monotonic()
            has_work = self._entries or not self._is_open
            if has_work and seconds <= 0:
                return
            self._news.wait(seconds if has_work else None)


class _LocalFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = 0

    def open(self, make_head: Callable[[bytes], bytes]) -> None:
        """Make the file's content what make_head makes of it."""
        content = self._path.read_bytes() if self._path.exists() else None
        head = make_head(content or b"")
        if head != content:
            files.write_whole(self._path, head)
        self._size = len(head)

    def append(self, data: bytes) -> None:
        """Append to what the last successful call left; what a failed one left is overwritten."""
        with self._path.open("r+b") as file:
            file.seek(self._size)
            file.write(data)
            file.truncate()
        self._size += len(data)


class _RemoteFile:
    def __init__(self, path: str) -> None:
        self._path = path
        self._content = b""
        self._is_stored = True

    def open(self, make_head: Callable[[bytes], bytes]) -> None:
        """Let the content become what make_head makes of it, with the next append."""
        try:
            content = remote.read(self._path, UPLOAD_TIMEOUT_SECONDS)
        except FileNotFoundError:
            content = None
        self._content = make_head(content or b"")
        self._is_stored = self._content == content

    def append(self, data: bytes) -> None:
        """Upload the whole file with `data` at its end."""
        content = self._content + data
        if data or not self._is_stored:
            remote.write(self._path, content, UPLOAD_TIMEOUT_SECONDS)
        self._content, self._is_stored = content, True


def _json_line(entry: _Entry) -> bytes:
    return json.dumps(entry[1]).encode() + b"\n"


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


def _curves_head(first_step: int) -> bytes:
    """How a TensorBoard event file starts that hides what others of its folder draw from first_step on."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    session = SessionLog(status=SessionLog.SessionStatus.START)
    events = (
        Event(wall_time=time.time(), file_version="brain.Event:2"),
        Event(wall_time=time.time(), step=first_step, session_log=session),
    )
    return b"".join(_event_record(event.SerializeToString()) for event in events)


def _curves_point(entry: _Entry) -> bytes:
    """A row's numbers as a TensorBoard event, empty where it has none."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.summary import scalar

    seconds, row = entry
    values = [
        value for name, number in _numbers(row).items() for value in scalar(name, number).value
    ]
    if not values:
        return b""
    event = Event(wall_time=seconds, step=row["step"], summary=Summary(value=values))
    return _event_record(event.SerializeToString())


def _event_record(data: bytes) -> bytes:
    """`data` as a record of an event file (TFRecord): length, its checksum, data, its checksum."""
    from tensorboardX.record_writer import masked_crc32c

    length = struct.pack("<Q", len(data))
    return b"".join(
        [
            length,
            struct.pack("<I", masked_crc32c(length)),
            data,
            struct.pack("<I", masked_crc32c(data)),
        ]
    )


class _Tracker:
    """A tracker in a thread of its own, which takes numbers and never makes anybody wait."""

    def __init__(self, name: str, opener: Callable[[], Any]) -> None:
        self._name, self._opener = name, opener
        self._rows: queue.Queue = queue.Queue(MAX_TRACKER_ROWS)
        self._is_off = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Hand over the numbers of a step."""
        if not self._is_off:
            try:
                self._rows.put_nowait((numbers, step))
            except queue.Full:
                self._switch_off(TimeoutError(f"it is {MAX_TRACKER_ROWS} rows behind"))

    def close(self) -> None:
        """Let it finish."""
        with contextlib.suppress(queue.Full):
            self._rows.put_nowait(None)

    def join(self, seconds: float) -> None:
        """Wait for close(); a warning where it does not finish."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._switch_off(TimeoutError(f"did not finish within {CLOSE_TIMEOUT_SECONDS:g} s"))

    def _work(self) -> None:
        try:
            run = self._opener()
            while not self._is_off and (row := self._rows.get()) is not None:
                numbers, step = row
                run.log(numbers, step=step)
            run.finish()
        except Exception as error:  # noqa: BLE001 (whatever a tracker throws, training continues)
            self._switch_off(error)

    def _switch_off(self, error: Exception) -> None:
        if not self._is_off:
            self._is_off = True
            _warn_off(self._name, error)


def _start_wandb(config: FrozenConfigDict, directory: epath.Path, run_id: str) -> Any:
    import wandb

    return wandb.init(
        project=config.tracker_project,
        name=config.run_name,
        id=run_id,
        resume="allow",
        dir=None if files.is_remote(directory) else str(directory),
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
            with contextlib.suppress(OSError):
                self._progress.update(
                    self._task, completed=row["step"] + 1, description=line, refresh=True
                )
        else:
            self.print([line])

    def print(self, lines: Iterable[str]) -> None:
        # Where stdout is a file on a full disk, or its reader is gone, a line is lost and no step.
        with contextlib.suppress(OSError):
            for line in lines:
                if self._progress:
                    self._console.print(Text(line))
                else:
                    print(line, flush=True)

    def close(self) -> None:
        with contextlib.suppress(OSError):
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
        for key in (
            "epoch",
            "file",
            "row_group",
            "conversation",
            "conversations_cut",
            "conversations_left_out",
        )
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
