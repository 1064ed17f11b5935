"""Stands in for the package filelock where it is missing and cannot be installed.

first_hour.py puts its folder on PYTHONPATH there. It has what MaxNano uses of FileLock: a lock that
the system gives up when its process ends.
"""

import fcntl
import os
from pathlib import Path


class Timeout(TimeoutError):
    """Another process holds the lock."""


class FileLock:
    """A lock on a file, which is created."""

    def __init__(self, path: str | os.PathLike):
        self._path = Path(path)
        self._file: int | None = None

    def acquire(self, blocking: bool = True) -> None:
        """Take the lock. Raises Timeout if blocking is false and another process holds it."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(file)
            raise Timeout(str(self._path)) from None
        self._file = file

    def release(self) -> None:
        """Give up the lock; does nothing without it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
