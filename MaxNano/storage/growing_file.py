"""A file that a thread appends to, so that neither a slow disk nor an object store delays training."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import logging
from etils import epath

from MaxNano import console
from MaxNano.storage import files, remote

# An object store cannot append, so the whole file is uploaded again: at this interval, or at a
# longer one if uploads would take more than MAX_UPLOAD_SHARE of the time.
REMOTE_WRITE_SECONDS = 60.0
MAX_UPLOAD_SHARE = 0.05
UPLOAD_TIMEOUT_SECONDS = 60.0
RETRY_SECONDS = 15.0  # after a failed write

MakeHead = Callable[[bytes], bytes]


class GrowingFile:
    """Appends entries to a local or remote file in a thread.

    make_head: maps the file's content at the start (b"" if it is missing) to the part to keep.
    encode: maps an entry to bytes. interval_seconds: least time between writes of a local file.
    After a failed write there is one warning, and the entries wait for the next attempt.
    """

    def __init__(
        self,
        path: epath.Path,
        make_head: MakeHead,
        encode: Callable[[Any], bytes],
        interval_seconds: float = 0.0,
    ) -> None:
        self._path = path
        self._is_remote = files.is_remote(path)
        self._file = _RemoteFile(str(path)) if self._is_remote else _LocalFile(Path(path))
        self._make_head, self._encode, self._interval_seconds = make_head, encode, interval_seconds
        self._entries: list[Any] = []  # not written yet
        self._written = 0
        self._is_open = self._is_closing = False
        self._is_hurried = True  # the first attempt shows at once whether the file can be written
        self._due = 0.0
        self._error: Exception | None = None  # of the last attempt
        self._changed = threading.Condition()  # guards all of the above
        self._thread = threading.Thread(target=self._work, name=path.name, daemon=True)
        self._thread.start()

    def add(self, entry: Any) -> None:
        """Append an entry, some time later."""
        with self._changed:
            self._entries.append(entry)
            self._changed.notify()

    def state(self) -> tuple[int, list[Any]]:
        """(number of entries in the file, entries that are not in it yet)."""
        with self._changed:
            return self._written, list(self._entries)

    def hurry(self) -> None:
        """Write the waiting entries without waiting for the interval."""
        with self._changed:
            if self._entries:
                self._is_hurried = True
                self._changed.notify()

    def close(self) -> None:
        """Try once more to write the waiting entries, then end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()

    def join(self, seconds: float) -> None:
        """Wait for close(); a warning if entries remain."""
        self._thread.join(seconds)
        _, unwritten = self.state()
        if unwritten:
            logging.warning(
                "%s does not have the last %d rows (%s); it has those up to the last checkpoint. "
                "Run the same command again to write the rest",
                self._path,
                len(unwritten),
                console.type_and_text(self._error or TimeoutError("still being written")),
            )

    def _work(self) -> None:
        is_closing = False
        while not is_closing:
            with self._changed:
                self._wait()
                entries, is_closing = list(self._entries), self._is_closing
                self._is_hurried = False
            started = time.monotonic()
            try:
                if not self._is_open:
                    self._file.open(self._make_head)
                    self._is_open = True
                self._file.append(b"".join(map(self._encode, entries)))
            except Exception as error:  # noqa: BLE001 (training continues whatever a store raises)
                if self._error is None:
                    logging.warning(
                        "%s cannot be written now; training continues and its rows wait (%s)",
                        self._path,
                        console.type_and_text(error),
                    )
                self._error, pause = error, RETRY_SECONDS
            else:
                if self._error is not None:
                    logging.warning("%s is written again, nothing is missing", self._path)
                self._error, pause = None, self._interval_seconds
                if self._is_remote:
                    seconds = time.monotonic() - started
                    pause = max(REMOTE_WRITE_SECONDS, seconds / MAX_UPLOAD_SHARE)
                with self._changed:
                    del self._entries[: len(entries)]
                    self._written += len(entries)
            self._due = time.monotonic() + pause

    def _wait(self) -> None:
        """Until there is something to write and a write is due; the caller holds the lock."""
        while not self._is_closing:
            seconds = 0.0 if self._is_hurried else self._due - time.monotonic()
            has_work = self._entries or not self._is_open
            if has_work and seconds <= 0:
                return
            self._changed.wait(seconds if has_work else None)


class _LocalFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = 0

    def open(self, make_head: MakeHead) -> None:
        """Replace the content by make_head(content)."""
        content = self._path.read_bytes() if self._path.exists() else None
        head = make_head(content or b"")
        if head != content:
            files.write_whole(self._path, head)
        self._size = len(head)

    def append(self, data: bytes) -> None:
        """Append after the last successful call's data; overwrites what a failed one left."""
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

    def open(self, make_head: MakeHead) -> None:
        """Replace the content by make_head(content), with the next append."""
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
