"""Document sources: the data set formats, all with the same interface.

A source is a sorted list of files, a file is a sequence of row groups, and a row group is a short
run of documents; stream.py reads them. folder.py decides which files train. To add a format, write
a class and a row of SOURCES, and list its name at `dataset_type` in configs/base.yml.
"""

import fnmatch
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from MaxNano import pyconfig
from MaxNano.data.folder import DamagedData, Folder, NotArrived, decode, naming, open_file
from MaxNano.data.lines import JsonlSource, TextSource
from MaxNano.data.manifest import MANIFEST

# Documents of a row group where the format has none. Another size would change the order of the
# data.
BLOCK_DOCUMENTS = 1024


class RowGroups(Protocol):
    """One opened file: its number of row groups, and the documents of each, one at a time.

    A row without text is None, and a damaged one DamagedData; other damage is raised.
    """

    def __len__(self) -> int: ...

    def documents(self, group: int) -> Iterator[str | None | DamagedData]: ...


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


class ParquetSource(Folder):
    """Parquet shards with one document per row of `text_column`; page checksums are verified."""

    endings = (".parquet",)

    def open_path(self, path: str) -> RowGroups:
        return _ParquetRowGroups(self.filesystem, path, self.column)


class HubName(NamedTuple):
    """A data set of the Hugging Face hub, or a part of its files."""

    repository: str  # owner/name
    pattern: str | None  # a folder in it, or a pattern for paths such as data/train-*

    def includes(self, path: str) -> bool:
        """Whether a file of the repository belongs to the data set."""
        if not path.endswith(HubSource.endings):
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
                f"hf:{config.dataset_name.removeprefix('hf:')} not found in {folder}: run "
                ".venv/bin/python MaxNano/data/download.py with the same arguments, or put its parquet files there"
            )
        super().__init__(config, split, folder)


_TEXT_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,  # not annotated as text: read as UTF-8
    pa.types.is_large_binary,
    pa.types.is_binary_view,
)


class _ParquetRowGroups:
    def __init__(self, filesystem: pafs.FileSystem, path: str, column: str):
        self._path, self._column = path, column
        with naming(path):
            self._file = pq.ParquetFile(
                open_file(filesystem, path), page_checksum_verification=True
            )
        schema = self._file.schema_arrow
        if schema.names.count(column) != 1:
            problem = "two columns" if column in schema.names else "no column"
            raise ValueError(
                f"{path}: {problem} {column!r}; set text_column to one of {', '.join(schema.names)}"
            )
        kind = schema.field(column).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not any(is_text(kind) for is_text in _TEXT_TYPES):
            raise ValueError(
                f"{path}: column {column!r} holds {kind}, not text; set text_column to another one"
            )

    def __len__(self) -> int:
        return self._file.num_row_groups

    def documents(self, group: int) -> Iterator[str | None]:
        # In batches: a row group may be larger than memory.
        with naming(f"{self._path}, row group {group}"):
            for batch in self._file.iter_batches(
                batch_size=BLOCK_DOCUMENTS, row_groups=[group], columns=[self._column]
            ):
                for text in batch.column(0).to_pylist():
                    yield decode(text) if isinstance(text, bytes) else text


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
            with naming(f"{self._where}, record {index}"):
                yield decode(text) if isinstance(text, bytes) else text


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
