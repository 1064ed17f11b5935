"""Experiment trackers: wandb and trackio, in threads, so that they can neither stop nor delay
training.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging
from etils import epath
from ml_collections import FrozenConfigDict

from MaxNano import console, pyconfig
from MaxNano.storage import files

MAX_TRACKER_ROWS = 10_000  # rows that may wait for a tracker; further ones are dropped
RETRY_SECONDS = 60.0  # after an error, before the tracker is opened again


class Tracker:
    """A tracker in a thread. After an error it is opened again later and gets the rows that wait."""

    def __init__(self, name: str, opener: Callable[[], Any]) -> None:
        self._name, self._opener = name, opener
        self._rows: queue.Queue = queue.Queue(MAX_TRACKER_ROWS)
        self._closing = threading.Event()
        self._is_failing = False  # a warning per outage
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Hand over the numbers of a step; returns at once."""
        try:
            self._rows.put_nowait((numbers, step))
        except queue.Full:
            self._warn(f"is {MAX_TRACKER_ROWS} rows behind; further rows are dropped")

    def close(self) -> None:
        """Let it finish."""
        self._closing.set()
        with contextlib.suppress(queue.Full):
            self._rows.put_nowait(None)

    def join(self, seconds: float) -> None:
        """Wait for close(); a warning if it takes longer."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._warn("did not finish in time")

    def _work(self) -> None:
        row = ()  # the row that the tracker has not taken; (): none
        while True:
            try:
                run = self._opener()
                while (row := row or self._next()) is not None:
                    numbers, step = row
                    run.log(numbers, step=step)
                    row, self._is_failing = (), False
                return run.finish()
            except ImportError as error:
                return self._warn(f"is off for this run ({console.type_and_text(error)})")
            except Exception as error:  # noqa: BLE001 (training continues whatever a tracker raises)
                reason = console.type_and_text(error)
                self._warn(f"failed, retrying every {RETRY_SECONDS:g} s ({reason})")
            if self._closing.wait(RETRY_SECONDS):
                return None

    def _next(self) -> tuple | None:
        """The next row, None at the end, for which close() finds no place in a full queue."""
        if self._closing.is_set() and self._rows.empty():
            return None
        return self._rows.get()

    def _warn(self, problem: str) -> None:
        if not self._is_failing:
            self._is_failing = True
            logging.warning("%s %s", self._name, problem)


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
        name=f"{config.run_name}-{run_id}",  # trackio identifies a run by its name
        resume="allow",
        config=_plain(config),
    )


def _plain(config: FrozenConfigDict) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key != pyconfig.ORIGIN}


# Name in config.trackers -> opener of an object with log(numbers, step=) and finish().
TRACKERS: dict[str, Callable[[FrozenConfigDict, epath.Path, str], Any]] = {
    "wandb": _start_wandb,
    "trackio": _start_trackio,
}
