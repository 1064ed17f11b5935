"""Writes the rows of a run to metrics.jsonl, TensorBoard and trackers, each in a thread."""

import json
import math
import os
import socket
import time
import uuid
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import FrozenConfigDict

from MaxNano.optimizers.groups import parameter_groups
from MaxNano.storage.growing_file import GrowingFile
from MaxNano.training.trackers import TRACKERS, Tracker

CURVES_WRITE_SECONDS = 5.0  # between writes of a local TensorBoard file
CLOSE_TIMEOUT_SECONDS = 30.0  # the end of a run waits this long for all files and trackers together

Entry = list  # [time in seconds since 1970, row]


def has_all_rows(directory: epath.PathLike, state: Mapping[str, Any]) -> bool:
    """Whether metrics.jsonl has the rows that were written when MetricFiles returned `state`.

    Those that a full disk or a kill kept back are only in the state.
    """
    path = epath.Path(directory).expanduser() / "metrics.jsonl"
    lines = path.read_bytes().count(b"\n") if path.exists() else 0
    return lines >= state["rows"] + len(state.get("unwritten", []))


class MetricFiles:
    """Writes rows to the files and trackers of the run in `directory` (local or gs://).

    state: what state() returned when the checkpoint was saved that this process resumes from.
    Rows that a killed run wrote to metrics.jsonl after that checkpoint are removed, because their
    steps are repeated. Rows that it had not yet written are in `state` and are written now.
    next_step: the first step of this process. Only the process with `is_main` writes.
    """

    def __init__(
        self,
        config: FrozenConfigDict,
        directory: epath.PathLike,
        state: Mapping[str, Any],
        *,
        next_step: int,
        is_main: bool,
    ) -> None:
        self._kept_rows = state["rows"]  # of earlier processes, at the start of metrics.jsonl
        # Checkpoints saved before these keys existed count written rows only.
        self._unwritten: list[Entry] = state.get("unwritten", [])
        self._events: list[Entry] = [  # see state()
            *state.get("events", []),
            *(entry for entry in self._unwritten if "event" in entry[1]),
        ]
        self._rates = {group.name: group.learning_rate for group in parameter_groups(config)}
        self._files: list[GrowingFile] = []
        self._trackers: list[Tracker] = []
        if not is_main:
            return
        directory = epath.Path(directory).expanduser()
        self._files.append(GrowingFile(directory / "metrics.jsonl", self._kept_lines, _json_line))
        if config.tensorboard:
            self._files.append(self._open_curves(config, directory / "tensorboard", next_step))
        self._trackers = [
            Tracker(name, lambda name=name: TRACKERS[name](config, directory, state["run_id"]))
            for name in config.trackers
        ]
        for entry in self._unwritten:
            for file in self._files:
                file.add(entry)

    def write(self, row: dict[str, Any]) -> None:
        """Hand a row to the threads that write it; returns at once."""
        # JSON has no nan and no infinity.
        row = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        entry = [time.time(), row]
        if "event" in row:
            self._events.append(entry)
        for file in self._files:
            file.add(entry)
        if numbers := _numbers(row, self._rates):
            for tracker in self._trackers:
                tracker.log(numbers, row["step"])

    def state(self, next_step: int) -> dict[str, Any]:
        """The state from which a process resumes at next_step; JSON-able. Does not wait for files.

        rows: number of rows that all files have. unwritten: the rows after those. events: written
        events of steps that TensorBoard will hide because their train rows are written again.
        """
        rows, unwritten = self._written()
        first_step = unwritten[0][1]["step"] if unwritten else next_step
        self._events = [entry for entry in self._events if entry[1]["step"] >= first_step]
        return {"rows": rows, "unwritten": unwritten, "events": _without(unwritten, self._events)}

    def close(self) -> None:
        """Write the remaining rows, for at most CLOSE_TIMEOUT_SECONDS."""
        deadline = time.monotonic() + CLOSE_TIMEOUT_SECONDS
        writers = [*self._files, *self._trackers]
        for writer in writers:
            writer.close()
        for writer in writers:
            writer.join(max(0.0, deadline - time.monotonic()))

    def _open_curves(
        self, config: FrozenConfigDict, directory: epath.Path, next_step: int
    ) -> GrowingFile:
        """This process's TensorBoard file.

        Its start has the hyperparameters. It hides what earlier processes drew of steps that are
        written again, and redraws those events of these steps that are not.
        """
        # Importing it takes 0.4 s, which a run without curves does not wait for.
        from MaxNano.training import tensorboard

        def encode(entry: Entry) -> bytes:
            seconds, row = entry
            return tensorboard.scalars(_numbers(row, self._rates), row["step"], seconds)

        first_step = min([next_step, *(entry[1]["step"] for entry in self._unwritten)])
        events = [encode(entry) for entry in _without(self._unwritten, self._events)]
        start = tensorboard.file_start(first_step)
        head = b"".join((start, tensorboard.hyperparameters(config, first_step), *events))
        # TensorBoard reads the files of a folder in the order of their names.
        process = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        path = directory / f"events.out.tfevents.{time.time():.6f}.{process}"
        return GrowingFile(path, lambda _: head, encode, CURVES_WRITE_SECONDS)

    def _kept_lines(self, content: bytes) -> bytes:
        """The rows of earlier processes in the content of metrics.jsonl."""
        lines = _whole_lines(content.decode(errors="replace"))[: self._kept_rows]
        self._kept_rows = len(lines)
        return "".join(lines).encode()

    def _written(self) -> tuple[int, list[Entry]]:
        """(number of rows that every file has, later rows); asks for the latter to be written."""
        if not self._files:
            return self._kept_rows, self._unwritten
        states = [file.state() for file in self._files]
        for file in self._files:
            file.hurry()
        written, unwritten = min(states, key=lambda state: state[0])
        return self._kept_rows + written, unwritten


def _without(unwritten: list[Entry], events: list[Entry]) -> list[Entry]:
    """The events that are not among the unwritten entries; these may be all rows of a long run."""
    waiting = {id(entry) for entry in unwritten}
    return [entry for entry in events if id(entry) not in waiting]


def _numbers(row: Mapping[str, Any], rates: Mapping[str, float]) -> dict[str, float]:
    """The finite numbers of a row under the names of curves, such as train/loss.

    rates: the learning rate of each parameter group, whose schedule makes a curve too.
    """
    prefix = row.get("event", "train")
    numbers = {
        f"{prefix}/{key}": value
        for key, value in row.items()
        if key != "step" and isinstance(value, int | float)
    }
    multiplier = numbers.get("train/lr_multiplier")
    if multiplier is not None:
        numbers |= {f"learning_rate/{name}": multiplier * rate for name, rate in rates.items()}
    return numbers


def _json_line(entry: Entry) -> bytes:
    return json.dumps(entry[1]).encode() + b"\n"


def _whole_lines(text: str) -> list[str]:
    """The lines of `text` before the first that is not a JSON object."""
    lines = []
    for line in text.splitlines(keepends=True):
        try:
            if not line.endswith("\n") or not isinstance(json.loads(line), dict):
                break
        except ValueError:
            break
        lines.append(line)
    return lines
