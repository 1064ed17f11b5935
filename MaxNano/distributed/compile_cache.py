"""Compiled programs kept in an object store, where the next machine of a run finds them.

A preemption takes the disk, and with it a cache that lies there. JAX can keep its cache on gs:// itself, but then each
program waits for the store, without a time limit, when it is looked up and when it is written. Here the names are
listed once, a program is read only where it is there, with a time limit, and it is uploaded by a thread. A store that
fails costs one warning and the time limit, and programs are compiled as without a cache.

JAX reaches this through etils.epath, as it reaches gs://: a path class for URLs of SCHEME. A program's name is its
JAX cache key, which has hashes of the program, the versions, the flags and the devices and no path of the machine.
Only process 0 of several writes. Objects of other code and versions stay until somebody deletes them.

Whoever may write to the folder can make its readers run code: give nobody else the right to.
"""

import hashlib
import pathlib
import queue
import threading
import time

import jax
from etils import epath

from MaxNano import console
from MaxNano.storage import remote

SCHEME = "maxnano-programs://"
LIST_TIMEOUT_SECONDS = 15.0
READ_TIMEOUT_SECONDS = 60.0
WRITE_TIMEOUT_SECONDS = 300.0
RETRY_SECONDS = 60.0  # after an upload that failed
FINISH_TIMEOUT_SECONDS = 30.0

_programs: "_Programs | None" = None  # the folder of this process; JAX has one cache


def start(folder: str) -> None:
    """Makes JAX look programs up in `folder` of an object store, and keep new ones there."""
    global _programs
    if _programs is None or _programs.folder != folder:
        _programs = _Programs(folder)
    # XLA's own cache on a GPU, of tuned kernels, knows local folders only and puts their path into JAX's cache key.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update("jax_compilation_cache_dir", SCHEME)


def finish() -> None:
    """Waits for uploads, for at most FINISH_TIMEOUT_SECONDS and not for a store that fails; call before the end."""
    if _programs is not None:
        _programs.finish()


class _Programs:
    """The programs in a folder. An object is the SHA-256 of JAX's cache entry, then the entry."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._names = remote.run_in_thread(lambda: remote.names(folder, LIST_TIMEOUT_SECONDS))
        self._is_readable = True
        self._entry: tuple[str, bytes] | None = (
            None  # what JAX has been told to be there and reads next
        )
        self._unwritten: dict[str, bytes] = {}
        self._is_writable = True  # as of the last attempt
        self._uploads: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._upload, name="compile cache", daemon=True).start()

    def exists(self, name: str) -> bool:
        """Whether read() has it. What cannot be read, or is not as it was written, does not exist."""
        entry = self._unwritten.get(name) or self._fetch(name)
        self._entry = None if entry is None else (name, entry)
        return entry is not None

    def read(self, name: str) -> bytes:
        """The entry that exists() found."""
        assert self._entry is not None and self._entry[0] == name
        entry, self._entry = self._entry[1], None
        return entry

    def write(self, name: str, entry: bytes) -> None:
        """Upload the entry, some time later."""
        self._unwritten[name] = entry
        self._uploads.put(name)

    def finish(self) -> None:
        """See finish()."""
        end = time.monotonic() + FINISH_TIMEOUT_SECONDS
        while self._unwritten and self._is_writable and time.monotonic() < end:
            time.sleep(0.05)

    def _fetch(self, name: str) -> bytes | None:
        if not self._is_readable:
            return None
        try:
            if name not in self._names.result():
                return None
            content = remote.read(f"{self.folder}/{name}", READ_TIMEOUT_SECONDS)
        except FileNotFoundError:  # deleted since
            return None
        except Exception as error:  # noqa: BLE001 (whatever the store throws, programs can be compiled)
            self._is_readable = False
            console.warn(
                f"compiled programs of {self.folder} cannot be read, they are compiled anew: "
                f"{console.type_and_text(error)}"
            )
            return None
        digest, entry = content[:32], content[32:]
        return entry if hashlib.sha256(entry).digest() == digest else None

    def _upload(self) -> None:
        has_warned = False
        while True:
            name = self._uploads.get()
            entry = self._unwritten[name]
            content = hashlib.sha256(entry).digest() + entry
            while True:
                try:
                    remote.write(f"{self.folder}/{name}", content, WRITE_TIMEOUT_SECONDS)
                    break
                except Exception as error:  # noqa: BLE001 (as above)
                    self._is_writable = False
                    if not has_warned:
                        has_warned = True
                        console.warn(
                            f"compiled programs cannot be written to {self.folder} now: {console.type_and_text(error)}"
                        )
                time.sleep(RETRY_SECONDS)
            self._is_writable = True
            if not self._names.exception():
                self._names.result().add(name)
            if self._unwritten[name] is entry:
                del self._unwritten[name]


@epath.register_path_cls(SCHEME)
class _Path(pathlib.PurePosixPath):
    """What JAX's cache asks of a path, of the folder and of an entry in it."""

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        pass  # an object store has no folders

    def exists(self) -> bool:
        return _programs.exists(self.name)

    def read_bytes(self) -> bytes:
        return _programs.read(self.name)

    def write_bytes(self, content: bytes) -> None:
        _programs.write(self.name, content)
