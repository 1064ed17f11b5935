"""The compilation cache in an object store, where the next machine of a run finds it.

A preempted machine loses its disk. JAX itself can cache on gs://, but then each lookup and each
write of a program waits for the store without a time limit. Here the names are listed once, an
existing program is read with a time limit, and a thread uploads new programs. A store that fails
costs one warning and the time limit; programs are then compiled as without a cache.

JAX reaches this cache through etils.epath, as it reaches gs://: a path class for URLs of SCHEME. A
program's name is its JAX cache key, a hash of program, versions, flags and devices without paths of
the machine. Of several processes only process 0 writes. Nothing deletes old programs.

Security: anyone who can write to the folder can run code on the machines that read it.
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
RETRY_SECONDS = 60.0  # after a failed upload
FINISH_TIMEOUT_SECONDS = 30.0

_cache: "_RemoteCache | None" = None  # the folder of this process; JAX has one cache


def start(folder: str) -> None:
    """Makes JAX read compiled programs from `folder` of an object store, and write new ones there."""
    global _cache
    if _cache is None or _cache.folder != folder:
        _cache = _RemoteCache(folder)
    # XLA's cache of tuned GPU kernels works only on local folders, whose path would become part of
    # JAX's cache key.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update("jax_compilation_cache_dir", SCHEME)


def finish() -> None:
    """Waits at most FINISH_TIMEOUT_SECONDS for uploads, unless the store fails; call before exit."""
    if _cache is not None:
        _cache.finish()


class _RemoteCache:
    """The compiled programs in a folder. An object is the SHA-256 of JAX's cache entry + the entry."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._names = remote.run_in_thread(lambda: remote.names(folder, LIST_TIMEOUT_SECONDS))
        self._is_readable = True
        # The entry that exists() found, which JAX reads next.
        self._entry: tuple[str, bytes] | None = None
        self._unwritten: dict[str, bytes] = {}
        self._is_writable = True  # as of the last attempt
        self._uploads: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._upload, name="compile cache", daemon=True).start()

    def exists(self, name: str) -> bool:
        """Whether read() can return the entry: it is in the store, readable and intact."""
        entry = self._unwritten.get(name) or self._fetch(name)
        self._entry = None if entry is None else (name, entry)
        return entry is not None

    def read(self, name: str) -> bytes:
        """The entry that exists() found."""
        assert self._entry is not None and self._entry[0] == name
        entry, self._entry = self._entry[1], None
        return entry

    def write(self, name: str, entry: bytes) -> None:
        """Uploads the entry in the background."""
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
        except Exception as error:  # noqa: BLE001 (after any error, programs can be compiled)
            self._is_readable = False
            console.warn(
                f"cannot read compiled programs from {self.folder}, compiling them again: "
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
                            f"cannot write compiled programs to {self.folder} now: "
                            f"{console.type_and_text(error)}"
                        )
                time.sleep(RETRY_SECONDS)
            self._is_writable = True
            if not self._names.exception():
                self._names.result().add(name)
            if self._unwritten[name] is entry:
                del self._unwritten[name]


@epath.register_path_cls(SCHEME)
class _CachePath(pathlib.PurePosixPath):
    """The path operations that JAX's cache uses, for the folder and for an entry in it."""

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        pass  # an object store has no folders

    def exists(self) -> bool:
        return _cache.exists(self.name)

    def read_bytes(self) -> bytes:
        return _cache.read(self.name)

    def write_bytes(self, content: bytes) -> None:
        _cache.write(self.name, content)
