"""Document sources: every data set format behind one interface, read by several logical readers.

A source is a sorted list of files, a file is a sequence of row groups, a row group a short run of
documents. Reader r of R takes row groups r, r + R, ... of each file, so what a reader sees depends
on R alone and never on hosts, devices or processes. A new format is a class and a row of `SOURCES`.
Source: nanochat/dataloader.py@92d63d4, _document_batches (rank r of W is reader r of R here).
"""

import contextlib
import io
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

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

    def open(self, file: int) -> RowGroups: ...


def start_of(reader: int) -> Position:
    """Where `reader` begins: epochs count from 1."""
    return Position(epoch=1, file=0, group=reader, row=0)


def read_lists(
    source: Source, reader: int, readers: int, size: int, position: Position
) -> Iterator[tuple[Position, list[str]]]:
    """Endless lists of up to `size` documents of one reader, each with the position behind it.

    Lists never cross a row group. Given one of the positions it yielded, it goes on behind it.
    Raises ValueError when a whole epoch holds no document for this reader.
    """
    epoch, file, group, row = position
    found = True  # an epoch that may be entered midway proves nothing
    while True:
        while file < len(source.files):
            groups = source.open(file)
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


def check_readers(source: Source, readers: int) -> None:
    """Raise ValueError when some reader would have nothing to read in all of `source`."""
    most = 0
    for file in range(len(source.files)):
        most = max(most, len(source.open(file)))
        if most >= readers:
            return
    raise ValueError(
        f"data_readers={readers} is too many for {source.where}: no file has more than {most} row "
        f"groups; set data_readers={most} or less, or write files with more row groups"
    )


def iterate_texts(config: Any, split: str) -> Iterator[str]:
    """Every document of the split once, in the order of the files (for training a tokenizer)."""
    source = SOURCES[config.dataset_type](config, split)
    for file in range(len(source.files)):
        groups = source.open(file)
        for group in range(len(groups)):
            yield from groups.documents(group)


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """Turn what a broken file raises into one line that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{where}: cannot be read ({line})") from None


class _Folder:
    """The files with one ending in a local folder or a bucket; the last is held out."""

    ending: str

    def __init__(self, config: Any, split: str):
        self.where = config.dataset_path
        self.column = config.text_column
        with _naming(f"dataset_path={config.dataset_path}"):
            if "://" in config.dataset_path:
                self.filesystem, folder = pafs.FileSystem.from_uri(config.dataset_path)
            else:
                self.filesystem = pafs.LocalFileSystem()
                folder = os.path.expanduser(config.dataset_path)
            found = self.filesystem.get_file_info(pafs.FileSelector(folder))
        self._paths = sorted(
            info.path
            for info in found
            if info.type == pafs.FileType.File
            and info.base_name.endswith(self.ending)
            and not info.base_name.startswith(".")
        )
        if len(self._paths) < 2:
            raise ValueError(
                f"dataset_path={config.dataset_path} holds {len(self._paths)} {self.ending} files; "
                "at least 2 are needed, the last in sorted order is held out for validation"
            )
        self._paths = self._paths[:-1] if split == "train" else self._paths[-1:]
        self.files = [os.path.basename(path) for path in self._paths]


class ParquetSource(_Folder):
    """Parquet shards, a document per row of `text_column`; page checksums are verified."""

    ending = ".parquet"

    def open(self, file: int) -> RowGroups:
        return _ParquetRowGroups(self.filesystem, self._paths[file], self.column)


class _ParquetRowGroups:
    def __init__(self, filesystem: pafs.FileSystem, path: str, column: str):
        self._path, self._column = path, column
        with _naming(path):
            self._file = pq.ParquetFile(
                filesystem.open_input_file(path), page_checksum_verification=True
            )
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
            self._file = io.BufferedReader(filesystem.open_input_file(path), BLOCK_BYTES)
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

    def open(self, file: int) -> RowGroups:
        return _JsonlBlocks(self.filesystem, self._paths[file], self.column)


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

    def open(self, file: int) -> RowGroups:
        return _TextBlocks(self.filesystem, self._paths[file])


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


SOURCES = {
    "parquet": ParquetSource,
    "jsonl": JsonlSource,
    "text": TextSource,
    "tfds": TfdsSource,
    "synthetic": SyntheticSource,
}
