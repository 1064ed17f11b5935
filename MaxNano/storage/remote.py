"""Calls to a bucket that end within a time limit, whatever the bucket does.

For files that a run can do without for a while, such as curves and compiled programs: a call that
hangs or is retried for too long is given up. Checkpoints use files.py, which waits longer.
"""

import concurrent.futures
import threading
import time
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import fsspec

from MaxNano.storage import files  # noqa: F401 (makes fsspec open gs:// with bucket.Bucket)


def read(path: Any, seconds: float) -> bytes:
    """The object's content. Raises FileNotFoundError, TimeoutError, or the store's error."""
    return _call("cat_file", path, seconds=seconds)


def write(path: Any, content: bytes, seconds: float) -> None:
    """Replace the object's content. Raises TimeoutError or the store's error."""
    _call("pipe_file", path, content, seconds=seconds)


def names(folder: Any, seconds: float) -> set[str]:
    """Names in a folder, empty if it is missing. Raises TimeoutError or the store's error."""
    try:
        return {PurePosixPath(path).name for path in _call("ls", folder, False, seconds=seconds)}
    except FileNotFoundError:
        return set()


def _call(method: str, path: Any, *arguments: Any, seconds: float) -> Any:
    """Call a method of the path's file system in a thread that can be abandoned."""
    deadline = time.monotonic() + seconds

    def call() -> Any:
        filesystem, name = fsspec.core.url_to_fs(str(path))  # may fetch credentials
        left = deadline - time.monotonic()
        if left <= 0:  # the caller has given up, and a later write may be done
            raise TimeoutError
        if not filesystem.async_impl:
            return getattr(filesystem, method)(name, *arguments)
        # The time limit cancels the request itself.
        method_async = getattr(filesystem, f"_{method}")
        return fsspec.asyn.sync(filesystem.loop, method_async, name, *arguments, timeout=left)

    try:
        return run_in_thread(call).result(seconds + 1)
    except TimeoutError:
        raise TimeoutError(f"no answer within {seconds:g} s for {path}") from None


def run_in_thread(function: Callable[[], Any]) -> concurrent.futures.Future:
    """The future result of `function` in a thread that does not keep the process alive."""
    future: concurrent.futures.Future = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 (raised by the future)
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future
