"""A reader's stream of documents: their order, the reader's position, and how it resumes.

Reader r of R takes row groups r, r + R, ... of each file, so its documents depend on R alone and
never on hosts, devices or processes. sources.py has the file formats.
Source: nanochat/dataloader.py@92d63d4, _document_batches (rank r of W is reader r of R here).
"""

import itertools
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from MaxNano.data.sources import MixtureSource, NotArrived, Source, open_source

POLL_SECONDS = 1.0  # between checks for a file that has not arrived
REMIND_SECONDS = 30.0  # between messages about it


# ---- Positions ----------------------------------------------------------------------------------


class StreamPosition(NamedTuple):
    """A reader has read `row` documents of row group `group` of file `file`. Epochs count from 1."""

    epoch: int
    file: int
    group: int
    row: int


class MixturePosition(NamedTuple):
    """A reader's position in each part of a mixture, and the characters read from each part."""

    parts: tuple[StreamPosition, ...]
    characters: tuple[int, ...]

    @property
    def epoch(self) -> int:
        """The epoch of the first part; log lines show the first part for the mixture."""
        return self.parts[0].epoch

    @property
    def file(self) -> int:
        return self.parts[0].file

    @property
    def group(self) -> int:
        return self.parts[0].group


SourcePosition = StreamPosition | MixturePosition


def start_position(source: Source, reader: int) -> SourcePosition:
    """The position at which `reader` of `source` begins."""
    if isinstance(source, MixtureSource):
        parts = tuple(start_position(part, reader) for part in source.parts)
        return MixturePosition(parts, (0,) * len(parts))
    return StreamPosition(epoch=1, file=0, group=reader, row=0)


def position_to_json(source: Source, position: SourcePosition) -> dict[str, Any]:
    """A position as JSON values; files by name, because indices change when files are added."""
    if isinstance(source, MixtureSource):
        parts = zip(source.parts, position.parts, position.characters, strict=True)
        return {
            "weights": list(source.weights),
            "parts": [
                {"characters": characters, **position_to_json(part, at)}
                for part, at, characters in parts
            ],
        }
    return {**position._asdict(), "file": source.files[position.file]}


def position_from_json(source: Source, saved: Mapping[str, Any]) -> SourcePosition:
    """The position that position_to_json got. Raises ValueError if `source` has changed since."""
    if isinstance(source, MixtureSource) != ("parts" in saved):
        raise ValueError(
            "the saved data position is from another kind of data set; resume with the same "
            "dataset_type"
        )
    if isinstance(source, MixtureSource):
        if saved["weights"] != list(source.weights):
            weights = ", ".join(f"{weight:g}" for weight in saved["weights"])
            raise ValueError(
                f"the saved data position is from a dataset_mixture with the weights {weights}; "
                "resume with the same mixture"
            )
        parts = zip(source.parts, saved["parts"], strict=True)
        return MixturePosition(
            tuple(position_from_json(part, at) for part, at in parts),
            tuple(at["characters"] for at in saved["parts"]),
        )
    if saved["file"] not in source.files:
        raise ValueError(
            f"the saved data position is in {saved['file']}, which {source.where} no longer has "
            "for this split; put the file back"
        )
    file = list(source.files).index(saved["file"])
    return StreamPosition(saved["epoch"], file, saved["group"], saved["row"])


# ---- Documents of one reader --------------------------------------------------------------------


def read_lists(
    source: Source, reader: int, readers: int, size: int, position: SourcePosition
) -> Iterator[tuple[SourcePosition, list[str]] | NotArrived]:
    """Endless lists of up to `size` documents of one reader, each with the position after it.

    Lists never cross a row group. Given a position that it yielded, it resumes after that list.
    Yields NotArrived, once per next(), until the file of the next list has arrived. Raises
    ValueError if a whole epoch has no document for this reader.
    """
    if isinstance(source, MixtureSource):
        yield from _read_mixture(source, reader, readers, size, position)
    epoch, file, group, row = position
    has_documents = True  # the first epoch may begin midway and proves nothing
    while True:
        while file < len(source.files):
            groups = source.open(file)
            if isinstance(groups, NotArrived):
                yield groups
                continue
            while group < len(groups):
                documents = itertools.islice(groups.documents(group), row, None)
                while texts := list(itertools.islice(documents, size)):
                    has_documents = True
                    row += len(texts)
                    yield StreamPosition(epoch, file, group, row), texts
                group, row = group + readers, 0
            file, group = file + 1, reader
        if not has_documents:
            raise ValueError(
                f"{source.where}: no document for reader {reader} of data_readers={readers}; "
                "use fewer readers or check the files"
            )
        epoch, file, has_documents = epoch + 1, 0, False


def _read_mixture(
    source: MixtureSource, reader: int, readers: int, size: int, position: MixturePosition
) -> Iterator[tuple[MixturePosition, list[str]] | NotArrived]:
    """Lists of the parts, always from the part that is furthest below its share of the text."""
    lists = [
        read_lists(part, reader, readers, size, at)
        for part, at in zip(source.parts, position.parts, strict=True)
    ]
    positions, characters = list(position.parts), list(position.characters)
    while True:
        turn = _furthest_below(characters, source.weights)
        item = next(lists[turn])
        if isinstance(item, NotArrived):
            yield item  # another part's turn would make the order depend on the network
            continue
        positions[turn], texts = item
        characters[turn] += sum(len(text) + 1 for text in texts)  # an empty text counts too
        yield MixturePosition(tuple(positions), tuple(characters)), texts


def _furthest_below(characters: Sequence[int], weights: Sequence[float]) -> int:
    return min(range(len(weights)), key=lambda part: characters[part] / weights[part])


def check_readers(source: Source, readers: int) -> None:
    """Raise ValueError if some reader would have nothing to read in all of `source`.

    Files that have not arrived are taken to be large enough; otherwise read_lists raises later.
    """
    if isinstance(source, MixtureSource):
        for part in source.parts:
            check_readers(part, readers)
        return
    most, all_arrived = 0, True
    for file in range(len(source.files)):
        groups = source.open(file)
        if isinstance(groups, NotArrived):
            all_arrived = False
            continue
        most = max(most, len(groups))
        if most >= readers:
            return
    if all_arrived:
        raise ValueError(
            f"data_readers={readers} is too many for {source.where}: no file has more than {most} "
            f"row groups; set data_readers={most} or less, or write files with more row groups"
        )


# ---- All documents once -------------------------------------------------------------------------


def iterate_texts(config: Any, split: str) -> Iterator[str]:
    """Every document of the split once, in the order of the files (to train a tokenizer).

    The parts of a mixture keep their shares as long as all parts last; then the others follow.
    """
    return texts_of(open_source(config, split))


def texts_of(source: Source) -> Iterator[str]:
    """Every document of a source once, as iterate_texts."""
    if isinstance(source, MixtureSource):
        yield from _texts_of_mixture(source)
        return
    patience, stopping = Patience(), threading.Event()
    for file in range(len(source.files)):
        while isinstance(groups := source.open(file), NotArrived):
            patience.wait(groups, stopping)
        for group in range(len(groups)):
            yield from groups.documents(group)


def _texts_of_mixture(source: MixtureSource) -> Iterator[str]:
    texts, weights = [texts_of(part) for part in source.parts], list(source.weights)
    characters = [0] * len(texts)
    while texts:
        turn = _furthest_below(characters, weights)
        text = next(texts[turn], None)
        if text is None:
            del texts[turn], weights[turn], characters[turn]
        else:
            characters[turn] += len(text) + 1
            yield text


# ---- Waiting for downloads ----------------------------------------------------------------------


class Patience:
    """Waits for files that have not arrived, reports it on stderr, and gives up at a limit."""

    def __init__(self) -> None:
        self._path = ""

    def wait(self, missing: NotArrived, stopping: threading.Event) -> None:
        """Wait for a moment, at most until `stopping` is set; then check again.

        Raises ValueError once both this wait and the download's silence exceed the limit.
        """
        now = time.monotonic()
        if missing.path != self._path:
            self._path, self._since, self._reported = missing.path, now, -math.inf
        if min(now - self._since, missing.quiet_seconds) >= missing.limit_seconds:
            raise ValueError(
                f"timed out after {missing.limit_seconds:g} s (data_wait_seconds) waiting for "
                f"{missing.path}: run data/download.py again with the same arguments"
            )
        if now - self._reported >= REMIND_SECONDS:
            self._reported = now
            print(f"Waiting for the download of {missing.path}", file=sys.stderr, flush=True)
        stopping.wait(POLL_SECONDS)
