"""Files on a local disk or in a bucket (gs://): one interface, and atomic writes for both.

A bucket is flat: mkdir does nothing, a folder exists only while an object has its prefix, and
objects cannot be renamed, only copied and deleted. An object appears whole or not at all, which
takes a rename on a disk. Importing this module makes everything that opens gs:// through fsspec
(etils.epath, orbax, JAX's compilation cache) use bucket.Bucket: no cached listings, time limits.
"""

import contextlib
import errno
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

from MaxNano import console

# What to do about OS errors that the user has to fix.
DISK_ERRORS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space or choose another folder"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "check its permissions or choose another folder"
    ),
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EIO: "check the disk",
}

PROBE_BYTES = 4096  # an empty file can be written to a full disk

for _protocol in ("gs", "gcs"):  # imported when the first gs:// path is used
    fsspec.register_implementation(_protocol, "MaxNano.storage.bucket.Bucket", clobber=True)


def run_directory(config: Any, run_name: str | None = None) -> epath.Path:
    """Folder of a run, of this one by default: base_output_directory/run_name."""
    return epath.Path(config.base_output_directory).expanduser() / (run_name or config.run_name)


def is_remote(path: epath.PathLike) -> bool:
    """Whether the path is in a bucket."""
    return "://" in os.fspath(path)


def exists(path: epath.Path) -> bool:
    """Whether a file or folder exists. Raises OSError if that cannot be known, as pathlib does not."""
    if is_remote(path):
        return path.exists()
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_writable(folder: Any, advice: str) -> None:
    """Raise ValueError if no file can be written to `folder`; call before minutes of work.

    Creates the folder. advice: what the user can do.
    """
    probe = epath.Path(folder).expanduser() / f".probe-{uuid.uuid4().hex}"
    try:
        write_whole(probe, bytes(PROBE_BYTES))
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({_reason(error)}); {advice}") from None


def _reason(error: OSError) -> str:
    return console.one_line(error.strerror or error, 300)


def names(folder: epath.Path) -> list[str]:
    """Sorted names in a folder. A missing folder is empty, as in a bucket."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def sizes(folder: epath.Path) -> dict[str, int]:
    """{relative name: bytes} of all files below a folder, sorted; one listing for a bucket.

    A missing folder is empty. Raises OSError if a folder cannot be listed.
    """

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    if is_remote(folder):
        root = os.fspath(folder).rstrip("/") + "/"
        filesystem, prefix = fsspec.core.url_to_fs(root)
        rows = filesystem.find(prefix, detail=True).values()
        by_name = {row["name"].removeprefix(prefix.rstrip("/") + "/"): row["size"] for row in rows}
    else:
        by_name = {
            os.path.relpath(os.path.join(root, name), folder): os.path.getsize(
                os.path.join(root, name)
            )
            for root, _, filenames in os.walk(folder, onerror=fail)
            for name in filenames
        }
    return dict(sorted(by_name.items()))


def sha256(path: epath.PathLike) -> str:
    """Hex SHA-256 of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: Any, name: str) -> str:
    """A UTF-8 text file. Raises ValueError, with `name` and the reason on one line, if that fails."""
    try:
        return epath.Path(path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name} cannot be read: line {line} is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {_reason(error)}") from None


def write_whole(path: Any, content: str | bytes) -> None:
    """Write a file atomically and create its folder. Raises OSError."""
    content = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        epath.Path(path).write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk
            error.filename = os.fspath(path)
        raise


def read_json_lines(path: Any) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines. A line that a killed process left half written is left
    out. Raises OSError.
    """
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def append(path: Any, line: str) -> None:
    """Append a line to a file, and create it and its folder. Raises OSError.

    In a bucket, which cannot append, the file is written again. A line that a killed process left
    half written stays a line of its own.
    """
    if is_remote(path):
        before = path.read_text() if path.exists() else ""
        write_whole(path, before + line)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())


@contextlib.contextmanager
def replace_folder(folder: epath.PathLike, last: str) -> Iterator[Path]:
    """An empty local folder to fill, which replaces `folder` when the block ends without an error.

    On a disk it is renamed. To a bucket its files are uploaded one by one, `last` at the end: a
    folder without that file is incomplete. An error of the disk names the folder.
    """
    if is_remote(folder):
        with tempfile.TemporaryDirectory() as temporary:
            new, target = Path(temporary), epath.Path(folder)
            yield new
            target.rmtree(missing_ok=True)
            for name in sorted(sizes(new), key=lambda name: name == last):
                write_whole(target / name, (new / name).read_bytes())
        return
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        try:
            yield new
        except OSError as error:
            if error.errno is not None and error.filename is None:
                error.filename = str(folder)
            raise
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
