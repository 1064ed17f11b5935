"""Ownership of a run: only one process writes its checkpoints.

On a disk the owner holds a file lock, which the system releases with the process. In a bucket no
lock can be held, because a machine may vanish at any time: the process that started last owns the
run, and an earlier one stops at its next save.
"""

import json
import platform
import uuid

import filelock
from etils import epath

from MaxNano import console
from MaxNano.storage import files
from MaxNano.storage.checkpoints import CheckpointError

LOCK = ".lock"


class Superseded(CheckpointError):
    """Another process owns the run now."""


class RunLock:
    """The lock of the run in a folder, which must exist on a disk."""

    def __init__(self, run: epath.Path) -> None:
        self._run = run
        self._id = uuid.uuid4().hex  # content of LOCK in a bucket
        self._lock = None if files.is_remote(run) else filelock.FileLock(run / LOCK)

    def acquire(self) -> None:
        """Become the owner. Raises CheckpointError if another process on this disk is; OSError."""
        if self._lock is None:
            owner = {"owner": self._id, "host": platform.node()}
            files.write_whole(self._run / LOCK, json.dumps(owner))
            return
        try:
            self._lock.acquire(blocking=False)
        except filelock.Timeout:
            raise CheckpointError(
                f"another process is writing to {self._run}; stop it or choose another run_name"
            ) from None

    def check(self) -> None:
        """Raises Superseded if another process has taken over the run."""
        if self._lock is not None or not (self._run / LOCK).exists():
            return
        lock = json.loads((self._run / LOCK).read_text())
        if lock["owner"] != self._id:
            raise Superseded(
                f"another process, on {lock['host']}, has taken over {self._run}; this one stops "
                "and its last steps are not saved"
            )

    def release(self) -> None:
        """Let another process own the run."""
        if self._lock is not None:
            self._lock.release()


def take_run(run: epath.Path, checkpoints: epath.Path) -> RunLock:
    """Create the folder of a run and become its owner. Raises CheckpointError."""
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        lock = RunLock(run)
        lock.acquire()
    except OSError as error:
        reason = console.one_line(error, 300)
        raise CheckpointError(
            f"cannot write to {run} ({reason}); set base_output_directory"
        ) from None
    return lock
