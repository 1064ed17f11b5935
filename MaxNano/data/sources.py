"""Document sources: every data set format behind one interface, read by several logical readers.

A source is a sorted list of files, a file is a sequence of row groups, a row group a short run of
documents. Reader r of R takes row groups r, r + R, ... of each file, so what a reader sees depends
on R alone and never on hosts, devices or processes. A new format is a class and a row of `SOURCES`.

A folder whose manifest.json (data/download.py writes one) lists its files can be read while they
still arrive: the list is the manifest's, and a file that is not there yet is waited for.
Source: nanochat/dataloader.py@92d63d4, _document_batches (rank r of W is reader r of R here).
"""

import contextlib
import fnmatch
import io
import itertools
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from MaxNano import pyconfig

MANIFEST = "manifest.json"  # {"files": {name: {"done": bool, ...}}} beside the files
POLL_SECONDS = 1.0  # between looks for a file that has not arrived
REMIND_SECONDS = 30.0  # between messages about it
BUCKET_RETRY_SECONDS = 120  # for which what fails in a bucket is tried again

# What plays the role of a row group in formats that have none. These sizes and the next two decide
# which documents a reader sees and where they begin: they are part of the data's identity.
BLOCK_BYTES = 1 << 17
BLOCK_DOCUMENTS = 1024
# Running text is cut at the first blank line behind the former and at any line behind the latter,
# because packing throws away what a document has beyond one row.
TEXT_DOCUMENT_CHARACTERS = 4_000
TEXT_DOCUMENT_MAX_CHARACTERS = 16_000


class Position(NamedTuple):
    """Where a reader stands: `row` documents of row group `group` of file `file` have been read."""

    epoch: int
    file: int
    group: int
    row: int


class MixturePosition(NamedTuple):
    """Where a reader of a mixture stands: in each part, and the text that each part has given."""

    parts: tuple[Position, ...]
    characters: tuple[int, ...]

    @property
    def epoch(self) -> int:
        """Of the first part, which stands for the mixture in messages; so do file and group."""
        return self.parts[0].epoch

    @property
    def file(self) -> int:
        return self.parts[0].file

    @property
    def group(self) -> int:
        return self.parts[0].group


class NotArrived(NamedTuple):
    """In place of a file that the manifest lists and the download has still to bring."""

    path: str
    quiet_seconds: float  # since the download last brought anything
    limit_seconds: float  # of quiet and of waiting, after which to give up


class RowGroups(Protocol):
    """One opened file: its number of row groups, and the documents of each (one at a time)."""

    def __len__(self) -> int: ...

    def documents(self, group: int) -> Iterator[str]: ...


class Source(Protocol):
    """The documents of one split. Built as `Source(config, split)`; pickles, for worker processes.

    `files` are names that identify each file across runs; `where` names the data set in messages.
    """

    where: str
    files: Sequence[str]

    def open(self, file: int) -> RowGroups | NotArrived: ...


class Patience:
    """Waits for files that have not arrived, says so on stderr, and knows when to give up."""

    def __init__(self) -> None:
        self._path = ""

    def wait(self, missing: NotArrived, stopping: threading.Event) -> None:
        """A short wait, ended at once by `stopping`; then look again.

        Raises ValueError when both the wait and the quiet of the download are at their limit.
        """
        now = time.monotonic()
        if missing.path != self._path:
            self._path, self._since, self._said = missing.path, now, -math.inf
        if min(now - self._since, missing.quiet_seconds) >= missing.limit_seconds:
            raise ValueError(
                f"{missing.path} has not arrived, and nothing else for {missing.limit_seconds:g} s "
                "(data_wait_seconds); start data/download.py again with the same arguments"
            )
        if now - self._said >= REMIND_SECONDS:
            self._said = now
            print(
                f"waiting for {missing.path}, which the download has still to bring",
                file=sys.stderr,
                flush=True,
            )
        stopping.wait(POLL_SECONDS)


def start_of(reader: int) -> Position:
    """Where `reader` begins: epochs count from 1."""
    return Position(epoch=1, file=0, group=reader, row=0)


def beginning(source: Source, reader: int) -> Position | MixturePosition:
    """Where `reader` of `source` begins."""
    if isinstance(source, MixtureSource):
        begin = tuple(beginning(part, reader) for part in source.parts)
        return MixturePosition(begin, (0,) * len(begin))
    return start_of(reader)


def read_lists(
    source: Source, reader: int, readers: int, size: int, position: Position | MixturePosition
) -> Iterator[tuple[Position | MixturePosition, list[str]] | NotArrived]:
    """Endless lists of up to `size` documents of one reader, each with the position behind it.

    Lists never cross a row group. Given one of the positions it yielded, it goes on behind it. In
    place of a list comes NotArrived, as often as it is asked, while the file of the next one is
    not there. Raises ValueError when a whole epoch holds no document for this reader.
    """
    if isinstance(source, MixtureSource):
        yield from _read_mixture(source, reader, readers, size, position)
    epoch, file, group, row = position
    found = True  # an epoch that may be entered midway proves nothing
    while True:
        while file < len(source.files):
            groups = source.open(file)
            if isinstance(groups, NotArrived):
                yield groups
                continue
            while group < len(groups):
                documents = itertools.islice(groups.documents(group), row, None)
                while texts := list(itertools.islice(documents, size)):
                    found = True
                    row += len(texts)
                    yield Position(epoch, file, group, row), texts
                group, row = group + readers, 0
            file, group = file + 1, reader
        if not found:
            raise ValueError(
                f"{source.where}: no document for reader {reader} of data_readers={readers}; "
                "use fewer readers or check the files"
            )
        epoch, file, found = epoch + 1, 0, False


def _read_mixture(
    source: "MixtureSource", reader: int, readers: int, size: int, position: MixturePosition
) -> Iterator[tuple[MixturePosition, list[str]] | NotArrived]:
    """Lists of the parts, always of the one that is furthest behind its share of the text."""
    lists = [
        read_lists(part, reader, readers, size, at)
        for part, at in zip(source.parts, position.parts, strict=True)
    ]
    positions, characters = list(position.parts), list(position.characters)
    while True:
        turn = _furthest_behind(characters, source.weights)
        item = next(lists[turn])
        if isinstance(item, NotArrived):
            yield item  # to take another part's turn would make the order depend on the network
            continue
        positions[turn], texts = item
        characters[turn] += sum(len(text) + 1 for text in texts)  # an empty one counts too
        yield MixturePosition(tuple(positions), tuple(characters)), texts


def _furthest_behind(characters: Sequence[int], weights: Sequence[float]) -> int:
    return min(range(len(weights)), key=lambda part: characters[part] / weights[part])


def position_to_json(source: Source, position: Position | MixturePosition) -> dict[str, Any]:
    """A position as JSON-able values; files go by their names, which last longer than their order."""
    if isinstance(source, MixtureSource):
        parts = zip(source.parts, position.parts, position.characters, strict=True)
        return {
            "weights": list(source.weights),
            "parts": [
                {"characters": given, **position_to_json(part, at)} for part, at, given in parts
            ],
        }
    return {
        "epoch": position.epoch,
        "file": source.files[position.file],
        "group": position.group,
        "row": position.row,
    }


def position_from_json(source: Source, saved: Mapping[str, Any]) -> Position | MixturePosition:
    """What position_to_json was given. Raises ValueError where `source` has changed since."""
    if isinstance(source, MixtureSource) != ("parts" in saved):
        raise ValueError(
            "the saved data position is of another kind of data set; go on with the same "
            "dataset_type"
        )
    if isinstance(source, MixtureSource):
        if saved["weights"] != list(source.weights):
            weights = ", ".join(f"{weight:g}" for weight in saved["weights"])
            raise ValueError(
                f"the saved data position has a dataset_mixture with the weights {weights}; go on "
                "with the same mixture"
            )
        parts = zip(source.parts, saved["parts"], strict=True)
        return MixturePosition(
            tuple(position_from_json(part, at) for part, at in parts),
            tuple(at["characters"] for at in saved["parts"]),
        )
    if saved["file"] not in source.files:
        raise ValueError(
            f"the saved data position lies in {saved['file']}, which {source.where} no longer has "
            "for this split; put the file back"
        )
    file = list(source.files).index(saved["file"])
    return Position(saved["epoch"], file, saved["group"], saved["row"])


def check_readers(source: Source, readers: int) -> None:
    """Raise ValueError when some reader would have nothing to read in all of `source`.

    Where files have still to arrive, those that are there may not tell; then reading will.
    """
    if isinstance(source, MixtureSource):
        for part in source.parts:
            check_readers(part, readers)
        return
    most, all_there = 0, True
    for file in range(len(source.files)):
        groups = source.open(file)
        if isinstance(groups, NotArrived):
            all_there = False
            continue
        most = max(most, len(groups))
        if most >= readers:
            return
    if not all_there:
        return
    raise ValueError(
        f"data_readers={readers} is too many for {source.where}: no file has more than {most} row "
        f"groups; set data_readers={most} or less, or write files with more row groups"
    )


def iterate_texts(config: Any, split: str) -> Iterator[str]:
    """Every document of the split once, in the order of the files (for training a tokenizer).

    Of a mixture as long as all parts last, in their shares; then what is left of the others.
    """
    return _texts_of(open_source(config, split))


def open_source(config: Any, split: str) -> Source:
    """The data set of the config: its documents for "train" or "validation"."""
    if config.dataset_type not in SOURCES:
        raise ValueError(
            f"dataset_type={config.dataset_type} has no documents of text; set dataset_type to one "
            f"of {', '.join(SOURCES)}"
        )
    return SOURCES[config.dataset_type](config, split)


def _texts_of(source: Source) -> Iterator[str]:
    if isinstance(source, MixtureSource):
        yield from _texts_of_mixture(source)
        return
    patience, stopping = Patience(), threading.Event()
    for file in range(len(source.files)):
        while isinstance(groups := source.open(file), NotArrived):
            patience.wait(groups, stopping)
        for group in range(len(groups)):
            yield from groups.documents(group)


def _texts_of_mixture(source: "MixtureSource") -> Iterator[str]:
    left = [
        (_texts_of(part), weight) for part, weight in zip(source.parts, source.weights, strict=True)
    ]
    characters = [0] * len(left)
    while left:
        turn = _furthest_behind(characters, [weight for _, weight in left])
        text = next(left[turn][0], None)
        if text is None:
            del left[turn], characters[turn]
        else:
            characters[turn] += len(text) + 1
            yield text


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """Turn what a broken file raises into one line that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{where}: cannot be read ({line})") from None


def _with_time_limit(where: str) -> str:
    """A bucket's address by which pyarrow gives up what fails for BUCKET_RETRY_SECONDS; it waits 15 minutes itself.

    Source: https://arrow.apache.org/docs/python/generated/pyarrow.fs.GcsFileSystem.html, and GcsOptions::FromUri
    in Arrow's C++.
    """
    if not where.startswith(("gs://", "gcs://")) or "?" in where:
        return where
    return f"{where}?retry_limit_seconds={BUCKET_RETRY_SECONDS}"


def _open(filesystem: pafs.FileSystem, path: str) -> pa.NativeFile:
    """A file to read. Raises OSError; pyarrow gives a closed file of a bucket that does not answer."""
    file = filesystem.open_input_file(path)
    if file.closed:
        raise OSError(f"the bucket did not answer for {BUCKET_RETRY_SECONDS} s")
    return file


class _Folder:
    """The files with one ending in a local folder or a bucket; the last is held out.

    Where a manifest lists them, it has the last word: a file that it does not list is refused, and
    one that is not there is waited for if it is still to be downloaded.
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
            found = self.filesystem.get_file_info(pafs.FileSelector(folder))
        present = {info.base_name for info in found if info.type == pafs.FileType.File}
        self._folder = folder.rstrip("/")
        self._listed = MANIFEST in present and bool(self._of_this_kind(self._manifest()))
        files = self._of_this_kind(self._manifest() if self._listed else present)
        unlisted = set(self._of_this_kind(present)) - set(files)
        if unlisted:
            raise ValueError(
                f"{self.where}/{min(unlisted)} is not in {MANIFEST}, which lists the files of this "
                "data set; move it away, or the manifest"
            )
        if len(files) < 2:
            raise ValueError(
                f"dataset_path={self.where} holds {len(files)} {self.ending} files; "
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
            try:
                return {
                    name: dict(facts) for name, facts in json.loads(file.read())["files"].items()
                }
            except (LookupError, TypeError, AttributeError):
                raise ValueError(f"{path}: lists no files; move it away or put it right") from None

    def path_of(self, file: int) -> str | NotArrived:
        """Where a file lies. Raises ValueError when it should be there and is not."""
        name = self.files[file]
        path = f"{self._folder}/{name}"
        if not self._listed or self._exists(path):
            return path
        is_coming = self._manifest().get(name, {}).get("done") is False
        if self._exists(path):  # it came between the two looks
            return path
        if not is_coming:
            raise ValueError(
                f"{path} is gone, though {MANIFEST} lists it; put it back or download it again"
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
    """Parquet shards, a document per row of `text_column`; page checksums are verified."""

    ending = ".parquet"

    def open_path(self, path: str) -> RowGroups:
        return _ParquetRowGroups(self.filesystem, path, self.column)


class HubName(NamedTuple):
    """A data set of the Hugging Face hub, and which of its files are meant."""

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
    """From dataset_name: owner/name, owner/name/folder or owner/name/pattern, hf: before it or not."""
    match = re.fullmatch(
        r"(?:hf:)?([\w.-]+/[\w.-]+)(?:/(.+))?", config.dataset_name or "", re.ASCII
    )
    if not match or ".." in match[0]:
        raise ValueError(
            "dataset_type=hf needs dataset_name=OWNER/NAME, such as "
            f"karpathy/climbmix-400b-shuffle; it is {config.dataset_name}"
        )
    return HubName(match[1], match[2])


def hub_folder(config: Any) -> str:
    """Where the files of a data set of the hub lie: a folder of its own below download_path."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "--", "/".join(filter(None, hub_name(config))))
    return f"{config.download_path.rstrip('/')}/{name.rstrip('-')}"


class HubSource(ParquetSource):
    """A parquet data set of the Hugging Face hub, as data/download.py brings it to this machine."""

    def __init__(self, config: Any, split: str):
        folder = hub_folder(config)
        local = Path(folder).expanduser()
        if (
            "://" not in folder
            and not any(local.glob("*.parquet"))
            and not (local / MANIFEST).exists()
        ):
            raise ValueError(
                f"hf:{config.dataset_name.removeprefix('hf:')} is not in {folder}; run python "
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
        # In batches: a row group of a foreign file may be larger than memory.
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
    """A file of lines cut into blocks of bytes: a block has the lines that begin in it.

    Blocks of bytes, because any of them can be reached without reading what lies before it.
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
                yield offset, line.decode("utf-8")
                offset += len(line)


class JsonlSource(_Folder):
    """One JSON object a line; its field `text_column` is the document. Empty lines are skipped."""

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
    """Running text, cut into documents of some thousand characters at blank lines.

    Not one document a file: packing keeps at most one row of a document, so that of a book
    nothing but its first page would be trained on.
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
            # Imported here: no other source needs it, and importing it takes seconds.
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
        return self.__dict__ | {"_records": None}  # opened files do not travel


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
                yield text.decode("utf-8") if isinstance(text, bytes) else text


class SyntheticSource:
    """Endless made-up documents from a seed: no files, for dry runs and benchmarks.

    Words follow Zipf's law and lengths are log-normal with a median of 300 words. The two splits
    share the words and nothing else.
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
        self._vocabulary = np.array(
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
            yield " ".join(self._vocabulary[np.minimum(words, self._words - 1)].tolist())


class MixtureSource:
    """Several data sets at once, each with a share of the text.

    A part has its own position and its own epochs, and begins again when it ends. Which part comes
    next follows from the text that each has given: nothing is drawn, and nothing is to be stored
    but that.
    """

    def __init__(self, config: Any, split: str):
        self.where = "dataset_mixture"
        self.weights, configs = zip(*mixture_parts(config), strict=True)
        self.parts = tuple(open_source(part, split) for part in configs)
        self.files = [part.where for part in self.parts]

    def open(self, file: int) -> RowGroups:
        raise TypeError("a mixture is read by read_lists and iterate_texts, which know its parts")


def mixture_parts(config: Any) -> list[tuple[float, Any]]:
    """(weight, config) of each part of dataset_mixture.

    A part is written [weight, type:place] or [weight, type:place, text_column]. The place is the
    folder, or the name where a data set has one; the rest is as in `config`.
    """
    parts = []
    for part in config.dataset_mixture:
        try:
            weight, source, *column = part
            kind, _, place = source.partition(":")
            if kind not in SOURCES or kind == "mixture" or len(column) > 1:
                raise ValueError
            if not place and kind != "synthetic":
                raise ValueError
            if not 0 < float(weight) < math.inf:
                raise ValueError
        except ValueError:
            known = ", ".join(name for name in SOURCES if name != "mixture")
            raise ValueError(
                f"dataset_mixture has a part [{', '.join(part)}] that is not [weight, type:place] or "
                f"[weight, type:place, text_column] with a weight above 0 and a type of {known}"
            ) from None
        key = "dataset_name" if kind in ("hf", "tfds") else "dataset_path"
        values = {"dataset_type": kind, key: place, "text_column": (*column, config.text_column)[0]}
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
