"""Document sources: the data set formats, all with the same interface.

A source is a sorted list of files, a file is a sequence of row groups, and a row group is a short
run of documents; stream.py reads them. To add a format, write a class and a row of SOURCES.

A folder with a manifest.json of its files (hub.py writes one) can be read while they download: the
manifest lists the files, and those that are missing have not arrived yet.
"""

import contextlib
import fnmatch
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from MaxNano import pyconfig
from MaxNano.data.manifest import MANIFEST, listed_files

BUCKET_RETRY_SECONDS = 120  # time limit for retries of a failed request to a bucket

# Row groups of formats that have none. These sizes and the next two decide which documents a reader
# gets and where they begin: other values would change the order of the data.
BLOCK_BYTES = 1 << 17
BLOCK_DOCUMENTS = 1024
# Running text is cut at the first blank line after this many characters, and at any line after the
# maximum, because packing drops the part of a document that is longer than a row.
TEXT_DOCUMENT_CHARACTERS = 4_000
TEXT_DOCUMENT_MAX_CHARACTERS = 16_000


class NotArrived(NamedTuple):
    """Stands for a file that the manifest lists and that is still being downloaded."""

    path: str
    quiet_seconds: float  # since the download last received anything
    limit_seconds: float  # timeout for the silence and for the wait


class RowGroups(Protocol):
    """One opened file: its number of row groups, and the documents of each, one at a time."""

    def __len__(self) -> int: ...

    def documents(self, group: int) -> Iterator[str]: ...


class Source(Protocol):
    """The documents of one split. Built as `Source(config, split)`; can be pickled for workers.

    `files` are names that identify each file across runs; `where` names the data set in messages.
    """

    where: str
    files: Sequence[str]

    def open(self, file: int) -> RowGroups | NotArrived: ...


def open_source(config: Any, split: str) -> Source:
    """The config's data set, for split "train" or "validation".

    Raises ValueError if its dataset_type has no text, or its files are missing.
    """
    if config.dataset_type not in SOURCES:
        raise ValueError(
            f"dataset_type={config.dataset_type} has no text documents; set dataset_type to one of "
            f"{', '.join(SOURCES)}"
        )
    return SOURCES[config.dataset_type](config, split)


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """Turn the error of a damaged file into one line that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{where}: cannot be read ({line})") from None


def _decode(text: bytes) -> str:
    return text.decode("utf-8")  # strict: damaged text stops the run instead of being trained on


def _with_time_limit(where: str) -> str:
    """A bucket's URL with a time limit of BUCKET_RETRY_SECONDS; pyarrow's default is 15 minutes.

    Source: https://arrow.apache.org/docs/python/generated/pyarrow.fs.GcsFileSystem.html, and
    GcsOptions::FromUri in Arrow's C++.
    """
    if not where.startswith(("gs://", "gcs://")) or "?" in where:
        return where
    return f"{where}?retry_limit_seconds={BUCKET_RETRY_SECONDS}"


def _open(filesystem: pafs.FileSystem, path: str) -> pa.NativeFile:
    """Open a file to read. Raises OSError."""
    file = filesystem.open_input_file(path)
    if file.closed:  # pyarrow's answer if the bucket does not respond
        raise OSError(f"the bucket did not answer for {BUCKET_RETRY_SECONDS} s")
    return file


class _Folder:
    """The files with one ending in a local folder or a bucket; the last is held out for validation.

    A manifest in the folder decides: a file that it does not list is refused, and a missing file
    that it lists as not done has not arrived yet.
    """

    ending: str

    def __init__(self, config: Any, split: str, folder: str | None = None):
        self.where = folder or config.dataset_path
        self.column = config.text_column
        self._config = config
        with _naming(f"dataset_path={self.where}"):
            if "://" in self.where:
                self.filesystem, folder = pafs.FileSystem.from_uri(_with_time_limit(self.where))
            else:
                self.filesystem = pafs.LocalFileSystem()
                folder = os.path.expanduser(self.where)
            infos = self.filesystem.get_file_info(pafs.FileSelector(folder))
        present = {info.base_name for info in infos if info.type == pafs.FileType.File}
        self._folder = folder.rstrip("/")
        self._listed = MANIFEST in present and bool(self._of_this_kind(self._manifest()))
        files = self._of_this_kind(self._manifest() if self._listed else present)
        unlisted = set(self._of_this_kind(present)) - set(files)
        if unlisted:
            raise ValueError(
                f"{self.where}/{min(unlisted)} is not in {MANIFEST}, which lists the files of this "
                "data set; move the file or the manifest away"
            )
        if len(files) < 2:
            raise ValueError(
                f"dataset_path={self.where} has {len(files)} {self.ending} files; "
                "at least 2 are needed, the last in sorted order is held out for validation"
            )
        self.files = files[:-1] if split == "train" else files[-1:]

    def _of_this_kind(self, names: Iterable[str]) -> list[str]:
        return sorted(
            name for name in names if name.endswith(self.ending) and not name.startswith(".")
        )

    def _manifest(self) -> dict[str, Any]:
        path = f"{self._folder}/{MANIFEST}"
        with _naming(path), _open(self.filesystem, path) as file:
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

    def open(self, file: int) -> RowGroups | NotArrived:
        path = self.path_of(file)
        return path if isinstance(path, NotArrived) else self.open_path(path)

    def open_path(self, path: str) -> RowGroups:
        raise NotImplementedError


class ParquetSource(_Folder):
    """Parquet shards with one document per row of `text_column`; page checksums are verified."""

    ending = ".parquet"

    def open_path(self, path: str) -> RowGroups:
        return _ParquetRowGroups(self.filesystem, path, self.column)


class HubName(NamedTuple):
    """A data set of the Hugging Face hub, or a part of its files."""

    repository: str  # owner/name
    pattern: str | None  # a folder in it, or a pattern for paths such as data/train-*

    def includes(self, path: str) -> bool:
        """Whether a file of the repository belongs to the data set."""
        if not path.endswith(HubSource.ending):
            return False
        return (
            self.pattern is None
            or path.startswith(f"{self.pattern.rstrip('/')}/")
            or fnmatch.fnmatchcase(path, self.pattern)
        )


def hub_name(config: Any) -> HubName:
    """Parse dataset_name: [hf:]OWNER/NAME, OWNER/NAME/FOLDER or OWNER/NAME/PATTERN.

    Raises ValueError for other forms.
    """
    match = re.fullmatch(
        r"(?:hf:)?([\w.-]+/[\w.-]+)(?:/(.+))?", config.dataset_name or "", re.ASCII
    )
    if not match or ".." in match[0]:
        raise ValueError(
            "dataset_type=hf needs dataset_name=OWNER/NAME, such as "
            f"karpathy/climbmix-400b-shuffle, not {config.dataset_name}"
        )
    return HubName(match[1], match[2])


def hub_folder(config: Any) -> str:
    """The folder below download_path for the files of a hub data set."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "--", "/".join(filter(None, hub_name(config))))
    return f"{config.download_path.rstrip('/')}/{name.rstrip('-')}"


class HubSource(ParquetSource):
    """A parquet data set of the Hugging Face hub, as data/download.py stores it on this machine."""

    def __init__(self, config: Any, split: str):
        folder = hub_folder(config)
        local = Path(folder).expanduser()
        if (
            "://" not in folder
            and not any(local.glob("*.parquet"))
            and not (local / MANIFEST).exists()
        ):
            raise ValueError(
                f"hf:{config.dataset_name.removeprefix('hf:')} not found in {folder}: run python "
                "MaxNano/data/download.py with the same arguments, or put its parquet files there"
            )
        super().__init__(config, split, folder)


class _ParquetRowGroups:
    def __init__(self, filesystem: pafs.FileSystem, path: str, column: str):
        self._path, self._column = path, column
        with _naming(path):
            self._file = pq.ParquetFile(_open(filesystem, path), page_checksum_verification=True)
        schema = self._file.schema_arrow
        if column not in schema.names:
            raise ValueError(
                f"{path}: no column {column!r}; set text_column to one of {', '.join(schema.names)}"
            )
        kind = schema.field(column).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(
                f"{path}: column {column!r} holds {kind}, not text; set text_column to another one"
            )

    def __len__(self) -> int:
        return self._file.num_row_groups

    def documents(self, group: int) -> Iterator[str]:
        # In batches: a row group may be larger than memory.
        with _naming(self._path):
            for batch in self._file.iter_batches(
                batch_size=BLOCK_DOCUMENTS, row_groups=[group], columns=[self._column]
            ):
                texts = batch.column(0)
                if texts.null_count:
                    raise ValueError(
                        f"{self._path}: row group {group} has rows without text "
                        f"(null in {self._column!r}); drop them"
                    )
                yield from texts.to_pylist()


class _LineBlocks:
    """A file of lines, cut into blocks of BLOCK_BYTES; a block has the lines that begin in it.

    A block can be reached without reading the file up to it.
    """

    def __init__(self, filesystem: pafs.FileSystem, path: str):
        self.path = path
        with _naming(path):
            self._file = io.BufferedReader(_open(filesystem, path), BLOCK_BYTES)
            self._size = self._file.seek(0, os.SEEK_END)

    def __len__(self) -> int:
        return (self._size + BLOCK_BYTES - 1) // BLOCK_BYTES

    def lines(self, group: int) -> Iterator[tuple[int, str]]:
        """(offset in bytes, line) of every line that begins in the block."""
        begin, end = group * BLOCK_BYTES, (group + 1) * BLOCK_BYTES
        with _naming(self.path):
            # From the byte before: if that one ends a line, the line at `begin` is ours.
            offset = self._file.seek(max(0, begin - 1))
            if begin:
                offset += len(self._file.readline())
            while offset < end:
                line = self._file.readline()
                if not line:
                    return
                yield offset, _decode(line)
                offset += len(line)


class JsonlSource(_Folder):
    """One JSON object per line; its field `text_column` is the document. Empty lines are skipped."""

    ending = ".jsonl"

    def open_path(self, path: str) -> RowGroups:
        return _JsonlBlocks(self.filesystem, path, self.column)


class _JsonlBlocks(_LineBlocks):
    def __init__(self, filesystem: pafs.FileSystem, path: str, field: str):
        super().__init__(filesystem, path)
        self._field = field

    def documents(self, group: int) -> Iterator[str]:
        for offset, line in self.lines(group):
            if not line.strip():
                continue
            with _naming(f"{self.path}, line at byte {offset}"):
                record = json.loads(line)
            text = record.get(self._field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise ValueError(
                    f"{self.path}, line at byte {offset}: no text in field {self._field!r}; "
                    "set text_column to the field that holds it"
                )
            yield text


class TextSource(_Folder):
    """Running text, cut at blank lines into documents of a few thousand characters.

    A file is not one document: packing keeps at most one row of each document, which would be the
    first page of a book.
    """

    ending = ".txt"

    def open_path(self, path: str) -> RowGroups:
        return _TextBlocks(self.filesystem, path)


class _TextBlocks(_LineBlocks):
    def documents(self, group: int) -> Iterator[str]:
        lines, characters = [], 0
        for _, line in self.lines(group):
            lines.append(line)
            characters += len(line)
            at_blank = not line.strip() and characters >= TEXT_DOCUMENT_CHARACTERS
            if at_blank or characters >= TEXT_DOCUMENT_MAX_CHARACTERS:
                yield from _stripped(lines)
                lines, characters = [], 0
        yield from _stripped(lines)


def _stripped(lines: list[str]) -> list[str]:
    text = "".join(lines).strip()
    return [text] if text else []


class TfdsSource:
    """A TensorFlow Datasets data set in a random-access format, read without TensorFlow."""

    def __init__(self, config: Any, split: str):
        if config.dataset_name is None:
            raise ValueError(
                "dataset_type=tfds needs dataset_name=NAME, NAME/CONFIG or NAME:VERSION"
            )
        self._name, self._folder = config.dataset_name, config.dataset_path
        self._split = config.dataset_splits[0 if split == "train" else 1]
        self._column = config.text_column
        self.where = f"{self._name} in {self._folder}"
        self.files = [self._split]
        self._records: Any = None

    def open(self, file: int) -> RowGroups:
        if self._records is None:
            # No other source needs it, and importing it takes seconds.
            import tensorflow_datasets as tfds

            try:
                folder = os.path.expanduser(self._folder)
                builder = tfds.builder(self._name, data_dir=folder, try_gcs=False)
                self._records = builder.as_data_source(self._split)
            except Exception as error:  # tfds and its readers raise many types
                line = str(error).splitlines()[0]
                raise ValueError(
                    f"tfds cannot open split {self._split!r} of {self.where} ({line})"
                ) from None
        return _TfdsBlocks(self._records, self._column, self.where)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_records": None}  # open files cannot be pickled


class _TfdsBlocks:
    def __init__(self, records: Sequence[Any], feature: str, where: str):
        self._records, self._feature, self._where = records, feature, where

    def __len__(self) -> int:
        return (len(self._records) + BLOCK_DOCUMENTS - 1) // BLOCK_DOCUMENTS

    def documents(self, group: int) -> Iterator[str]:
        begin = group * BLOCK_DOCUMENTS
        for index in range(begin, min(begin + BLOCK_DOCUMENTS, len(self._records))):
            record = self._records[index]
            if self._feature not in record:
                raise ValueError(
                    f"{self._where}: no feature {self._feature!r}; "
                    f"set text_column to one of {', '.join(record)}"
                )
            text = record[self._feature]
            if not isinstance(text, str | bytes):
                raise ValueError(
                    f"{self._where}: feature {self._feature!r} is not text; "
                    "set text_column to another one"
                )
            with _naming(f"{self._where}, record {index}"):
                yield _decode(text) if isinstance(text, bytes) else text


class SyntheticSource:
    """Endless random documents from a seed, for dry runs and benchmarks without files.

    Words follow Zipf's law and lengths are log-normal with a median of 300 words. Both splits have
    the same words in different documents.
    """

    def __init__(self, config: Any, split: str):
        self.where = "the synthetic data set"
        self.files = ["synthetic"]
        self._seed = config.seed
        self._split = 0 if split == "train" else 1

    def open(self, file: int) -> RowGroups:
        return _SyntheticBlocks(self._seed, self._split)


class _SyntheticBlocks:
    _documents = 128
    _words = 4096

    def __init__(self, seed: int, split: int):
        self._seed, self._split = seed, split
        random = np.random.default_rng(seed)
        letters = random.integers(ord("a"), ord("z") + 1, (self._words, 12), dtype=np.uint8)
        lengths = random.integers(2, 13, self._words)
        self._lexicon = np.array(
            [row[:n].tobytes().decode() for row, n in zip(letters, lengths, strict=True)]
        )
        frequencies = 1.0 / np.arange(1, self._words + 1)
        self._cumulative = np.cumsum(frequencies / frequencies.sum())

    def __len__(self) -> int:
        return sys.maxsize

    def documents(self, group: int) -> Iterator[str]:
        random = np.random.default_rng((self._seed, self._split, group))
        lengths = random.lognormal(np.log(300), 0.8, self._documents).astype(int) + 1
        for length in lengths:
            words = np.searchsorted(self._cumulative, random.random(length))
            # The sum of the frequencies may round to just below 1.
            yield " ".join(self._lexicon[np.minimum(words, self._words - 1)].tolist())


class MixtureSource:
    """Several data sets at once, each with a share of the text.

    Each part has its own position and epochs. The next documents come from the part furthest below
    its share, so the order follows from the characters read so far and no random state is saved.
    """

    def __init__(self, config: Any, split: str):
        self.where = "dataset_mixture"
        self.weights, configs = zip(*mixture_parts(config), strict=True)
        self.parts = tuple(open_source(part, split) for part in configs)
        self.files = [part.where for part in self.parts]

    def open(self, file: int) -> RowGroups:
        raise TypeError("stream.py reads the parts of a mixture")


def mixture_parts(config: Any) -> list[tuple[float, Any]]:
    """(weight, config) of each part of dataset_mixture. Raises ValueError for a malformed part.

    A part is [weight, type:location] or [weight, type:location, text_column]. The location is
    dataset_name for hf and tfds and dataset_path otherwise; other keys are those of `config`.
    """
    parts = []
    for part in config.dataset_mixture:
        try:
            weight, source, *column = part
            kind, _, location = source.partition(":")
            if kind not in SOURCES or kind == "mixture" or len(column) > 1:
                raise ValueError
            if not location and kind != "synthetic":
                raise ValueError
            if not 0 < float(weight) < math.inf:
                raise ValueError
        except ValueError:
            known = ", ".join(name for name in SOURCES if name != "mixture")
            raise ValueError(
                f"dataset_mixture has a part [{', '.join(part)}] that is not [weight, type:location] or "
                f"[weight, type:location, text_column] with a weight above 0 and a type of {known}"
            ) from None
        key = "dataset_name" if kind in ("hf", "tfds") else "dataset_path"
        values = {
            "dataset_type": kind,
            key: location,
            "text_column": (*column, config.text_column)[0],
        }
        parts.append((float(weight), pyconfig.replace(config, "dataset_mixture", **values)))
    if not parts:
        raise ValueError(
            "dataset_type=mixture needs dataset_mixture, such as "
            "[[0.8, hf:karpathy/climbmix-400b-shuffle], [0.2, jsonl:data/notes]]"
        )
    return parts


SOURCES = {
    "parquet": ParquetSource,
    "hf": HubSource,
    "jsonl": JsonlSource,
    "text": TextSource,
    "tfds": TfdsSource,
    "synthetic": SyntheticSource,
    "mixture": MixtureSource,
}
