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

MAX_TRACKER_ROWS = 10_000  # rows that may wait for a tracker before it is switched off


class Tracker:
    """A tracker in a thread. After an error there is one warning, and the run continues without it."""

    def __init__(self, name: str, opener: Callable[[], Any]) -> None:
        self._name, self._opener = name, opener
        self._rows: queue.Queue = queue.Queue(MAX_TRACKER_ROWS)
        self._is_off = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Hand over the numbers of a step; returns at once."""
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
        """Wait for close(); a warning if it takes longer."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._switch_off(TimeoutError("it did not finish in time"))

    def _work(self) -> None:
        try:
            run = self._opener()
            while not self._is_off and (row := self._rows.get()) is not None:
                numbers, step = row
                run.log(numbers, step=step)
            run.finish()
        except Exception as error:  # noqa: BLE001 (training continues whatever a tracker raises)
            self._switch_off(error)

    def _switch_off(self, error: Exception) -> None:
        if not self._is_off:
            self._is_off = True
            reason = console.type_and_text(error)
            logging.warning("%s is off for the rest of this run (%s)", self._name, reason)


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
