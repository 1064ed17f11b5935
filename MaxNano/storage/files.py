"""Files on a disk or in a bucket: what the two do differently is decided here, once.

A bucket (gs://) is flat: mkdir does nothing, a folder is there only while an object has its prefix, and nothing can be
renamed, only copied and deleted. But an object appears whole or not at all, which on a disk takes a rename.
With this module imported, whatever opens gs:// through fsspec (etils.epath, orbax, JAX's compilation cache) gets
bucket.Bucket, which keeps no listings and waits for nothing without a limit.
"""

import os
from typing import Any

import fsspec
from etils import epath

for _protocol in ("gs", "gcs"):  # imported when the first gs:// path is used
    fsspec.register_implementation(_protocol, "MaxNano.storage.bucket.Bucket", clobber=True)


def is_remote(path: epath.PathLike) -> bool:
    """Whether the path is in a bucket."""
    return "://" in os.fspath(path)


def names(folder: epath.Path) -> list[str]:
    """Names of what is in a folder, sorted; none where the folder is missing, as an empty one is in a bucket."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return []


def sizes(folder: epath.Path) -> dict[str, int]:
    """Bytes of every file below a folder by its relative name, sorted; of a bucket in one listing."""
    if is_remote(folder):
        root = os.fspath(folder).rstrip("/") + "/"
        filesystem, prefix = fsspec.core.url_to_fs(root)
        rows = filesystem.find(prefix, detail=True).values()
        found = {row["name"].removeprefix(prefix.rstrip("/") + "/"): row["size"] for row in rows}
    else:
        found = {
            os.path.relpath(os.path.join(at, name), folder): os.path.getsize(os.path.join(at, name))
            for at, _, files in os.walk(folder)
            for name in files
        }
    return dict(sorted(found.items()))


def write_whole(path: Any, content: str | bytes) -> None:
    """Writes a file whole or not at all, and makes its folder. Raises OSError."""
    content = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        epath.Path(path).write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
