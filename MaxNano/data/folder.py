"""A folder of data files, local or in a bucket: which of them train and which validate.

A folder with a manifest.json of its files (hub.py writes one) can be read while they download: the
manifest lists the files, and those that are missing have not arrived yet.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs

from MaxNano.data.manifest import MANIFEST, listed_files

BUCKET_RETRY_SECONDS = 120  # time limit for retries of a failed request to a bucket

# Words in an error of a storage service, which another attempt may not get: no damage of the file.
_SERVICE_ERROR = re.compile(r"google::cloud|AWS Error|bucket did not answer|curl", re.IGNORECASE)

# The files of other formats, for the message about a folder without files of the right one.
_FORMATS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".txt": "text",
    ".md": "text",
}


class DamagedData(ValueError):
    """A part of the data that cannot be read; skip_corrupt_data=true leaves it out."""


class NotArrived(NamedTuple):
    """Stands for a file that the manifest lists and that is still being downloaded."""

    path: str
    quiet_seconds: float  # since the download last received anything
    limit_seconds: float  # timeout for the silence and for the wait


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Turn the error of a damaged file into one line that names it: DamagedData, or ValueError if
    only the access failed.
    """
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        is_access = isinstance(error, OSError) and (
            error.errno is not None or _SERVICE_ERROR.search(line)
        )
        kind = ValueError if is_access else DamagedData
        raise kind(f"{where}: cannot be read ({line})") from None


def decode(text: bytes) -> str:
    """Strict UTF-8: damaged text must not be trained on. Raises UnicodeDecodeError."""
    return text.decode("utf-8")


def open_file(filesystem: pafs.FileSystem, path: str) -> pa.NativeFile:
    """Open a file to read. Raises OSError."""
    file = filesystem.open_input_file(path)
    if file.closed:  # pyarrow's answer if the bucket does not respond
        raise OSError(f"the bucket did not answer for {BUCKET_RETRY_SECONDS} s")
    return file


def _check_folder(folder: str, where: str) -> None:
    """Raise ValueError if a local folder is not there, with what to do about it."""
    if os.path.isfile(folder):
        raise ValueError(f"dataset_path={where} is a file; set it to the folder of the file")
    if not os.path.exists(folder):
        raise ValueError(
            f"dataset_path={where} does not exist; set it to a folder of text, or get text with"
            " end_to_end/cpu/prepare_text.py or MaxNano/data/download.py"
        )


def _with_time_limit(where: str) -> str:
    """A bucket's URL with a time limit of BUCKET_RETRY_SECONDS; pyarrow's default is 15 minutes.

    Source: https://arrow.apache.org/docs/python/generated/pyarrow.fs.GcsFileSystem.html, and
    GcsOptions::FromUri in Arrow's C++.
    """
    if not where.startswith(("gs://", "gcs://")) or "?" in where:
        return where
    return f"{where}?retry_limit_seconds={BUCKET_RETRY_SECONDS}"


# ---- Splits -------------------------------------------------------------------------------------

_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
# A split's name, alone or after other words, and then at most numbers: train-00000-of-00008,
# c4-validation.00001, wiki_test.
_SPLIT_NAME = re.compile(
    rf"(?:.*[-_.])?({'|'.join(_SPLITS)})(?:[-_.]?\d[\w.-]*)?", re.IGNORECASE | re.DOTALL
)


_HIDDEN = re.compile(r"(^|/)\.")


class SplitFiles(NamedTuple):
    """The files of a data set by their use, each in sorted order."""

    train: list[str]
    validation: list[str]
    unused: list[str]


def split_of(name: str, ending: str = "") -> str | None:
    """The split that a file is named after, as on the Hugging Face hub: train, validation or test.

    Its own name decides, then the folders in its path; "--" separates folders too, because
    downloads are stored in a flat folder. None if no name is that of a split.
    """
    *folders, file = re.split(r"/|--", name.removesuffix(ending))
    for part in (file, *reversed(folders)):
        if match := _SPLIT_NAME.fullmatch(part):
            return _SPLITS[match[1].lower()]
    return None


def split_files(names: Iterable[str], endings: Iterable[str] = (".parquet",)) -> SplitFiles:
    """Which files train and which validate.

    Files that are named after the validation split validate; if there are none, those of the test
    split; if there are none either, the last of all files in sorted order, as in nanochat. A test
    split beside a validation split is not used. Every other file trains.
    """
    by_split: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for name in sorted(names):
        ending = max((end for end in endings if name.endswith(end)), key=len, default="")
        by_split[split_of(name, ending) or "train"].append(name)
    train, validation, test = by_split.values()
    if validation:
        return SplitFiles(train, validation, test)
    if test:
        return SplitFiles(train, test, [])
    return SplitFiles(train[:-1], train[-1:], [])


# ---- Folders ------------------------------------------------------------------------------------


class Folder:
    """The files with some endings in a local folder or a bucket.

    If the folder itself has none, those of its subfolders are read. A manifest in the folder
    decides: a file that it does not list is refused, and a missing file that it lists as not done
    has not arrived yet. `files` are those of the split; `unused` are those of no split, and
    subfolders that are not read.
    """

    endings: tuple[str, ...]

    def __init__(self, config: Any, split: str, folder: str | None = None):
        self.where = folder or config.dataset_path
        self.column = config.text_column
        self._config = config
        with naming(f"dataset_path={self.where}"):
            if "://" in self.where:
                self.filesystem, folder = pafs.FileSystem.from_uri(_with_time_limit(self.where))
            else:
                self.filesystem = pafs.LocalFileSystem()
                folder = os.path.expanduser(self.where)
                _check_folder(folder, self.where)
            self._folder = folder.rstrip("/")
            present, subfolders = self._present(recursive=False)
        self._listed = MANIFEST in present and bool(self._of_this_kind(self._manifest()))
        files = self._of_this_kind(self._manifest() if self._listed else present)
        unlisted = set(self._of_this_kind(present)) - set(files)
        if unlisted:
            raise ValueError(
                f"{self.where}/{min(unlisted)} is not in {MANIFEST}, which lists the files of this "
                "data set; move the file or the manifest away"
            )
        if not files:
            with naming(f"dataset_path={self.where}"):
                present, subfolders = self._present(recursive=True)[0], []
            files = self._of_this_kind(present)
        splits = split_files(files, self.endings)
        if not files:
            hint = self._other_formats(present) or "; put some there, or name another folder"
            raise ValueError(
                f"dataset_path={self.where} has no {' or '.join(self.endings)} files{hint}"
            )
        if not (splits.train and splits.validation):
            raise ValueError(
                f"dataset_path={self.where} has {len(files)} {' or '.join(self.endings)} files, "
                f"{len(splits.train)} of them to train on; at least 2 are needed, because those of "
                f"the validation split, or the last one, are held out"
                f"{'; split the file' * (len(files) == 1)}"
            )
        self.files = splits.train if split == "train" else splits.validation
        self.unused = [*splits.unused, *subfolders]

    def _present(self, recursive: bool) -> tuple[set[str], list[str]]:
        """(files, subfolders with a final slash), relative to the folder, without hidden ones."""
        infos = self.filesystem.get_file_info(pafs.FileSelector(self._folder, recursive=recursive))
        names = {
            os.path.relpath(info.path, self._folder): info.type == pafs.FileType.File
            for info in infos
        }
        names = {name: is_file for name, is_file in names.items() if not _HIDDEN.search(name)}
        files = {name for name, is_file in names.items() if is_file}
        return files, sorted(f"{name}/" for name in names.keys() - files)

    def _of_this_kind(self, names: Iterable[str]) -> list[str]:
        """The names with one of the endings, sorted; not a compressed file beside the same one
        decompressed.
        """
        names = set(names)
        return sorted(
            name
            for name in names
            if name.endswith(self.endings)
            and not name.startswith(".")
            and not (name.endswith((".gz", ".zst")) and name.rpartition(".")[0] in names)
        )

    def _other_formats(self, names: Iterable[str]) -> str:
        """What to do about a folder whose files have another format."""
        for ending, kind in _FORMATS.items():
            if ending not in self.endings and any(name.endswith(ending) for name in names):
                return f"; dataset_type={kind} reads its {ending} files"
        return ""

    def _manifest(self) -> dict[str, Any]:
        path = f"{self._folder}/{MANIFEST}"
        with naming(path), open_file(self.filesystem, path) as file:
            return listed_files(file.read(), path)

    def listed(self) -> dict[str, dict[str, Any]]:
        """The facts that the manifest has of each file; {} without a manifest."""
        return self._manifest() if self._listed else {}

    def path_of(self, file: int) -> str | NotArrived:
        """The path of a file. Raises ValueError if it was downloaded and is missing now."""
        name = self.files[file]
        path = f"{self._folder}/{name}"
        if not self._listed or self._exists(path):
            return path
        is_coming = self._manifest().get(name, {}).get("done") is False
        if self._exists(path):  # it arrived between the two checks
            return path
        if not is_coming:
            raise ValueError(
                f"{path} is missing, but {MANIFEST} lists it; put it back or download it again"
            )
        touched = self.filesystem.get_file_info(f"{self._folder}/{MANIFEST}").mtime_ns
        return NotArrived(path, time.time() - touched / 1e9, self._config.data_wait_seconds)

    def _exists(self, path: str) -> bool:
        return self.filesystem.get_file_info(path).type == pafs.FileType.File

    def open(self, file: int) -> Any:
        """The RowGroups of a file (sources.py), or NotArrived. Raises DamagedData."""
        path = self.path_of(file)
        return path if isinstance(path, NotArrived) else self.open_path(path)

    def open_path(self, path: str) -> Any:
        raise NotImplementedError
