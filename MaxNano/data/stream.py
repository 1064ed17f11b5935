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

from MaxNano.data.folder import DamagedData, NotArrived
from MaxNano.data.sources import MixtureSource, RowGroups, Source, open_source
from MaxNano.scaling import largest_divisor

POLL_SECONDS = 1.0  # between checks for a file that has not arrived
REMIND_SECONDS = 30.0  # between messages about it

_END = object()  # of the rows of a row group; None is a row


# ---- Positions ----------------------------------------------------------------------------------


class StreamPosition(NamedTuple):
    """A reader has read `row` rows of row group `group` of file `file`. Epochs count from 1.

    The counts are of all epochs.
    """

    epoch: int
    file: int
    group: int
    row: int
    rows_without_text: int = 0
    damaged_parts: int = 0  # left out with skip_corrupt_data


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

    @property
    def rows_without_text(self) -> int:
        """The counts are of all parts."""
        return sum(part.rows_without_text for part in self.parts)

    @property
    def damaged_parts(self) -> int:
        return sum(part.damaged_parts for part in self.parts)


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
    counts = (saved.get(name, 0) for name in ("rows_without_text", "damaged_parts"))
    return StreamPosition(saved["epoch"], file, saved["group"], saved["row"], *counts)


# ---- Documents of one reader --------------------------------------------------------------------


def read_lists(
    source: Source,
    reader: int,
    readers: int,
    size: int,
    position: SourcePosition,
    *,
    characters: float = math.inf,
    skip_damaged: bool = False,
) -> Iterator[tuple[SourcePosition, list[str]] | NotArrived]:
    """Endless lists of up to `size` documents of one reader, each with the position after it.

    Lists never cross a row group, end at `characters`, and may be empty. Given a position that it
    yielded, it resumes after that list. Rows without text are skipped and counted; so are damaged
    parts with skip_damaged, otherwise DamagedData is raised. Yields NotArrived, once per next(),
    until the file of the next list has arrived. Raises ValueError if a whole epoch has no document
    for this reader.
    """
    options = {"characters": characters, "skip_damaged": skip_damaged}
    if isinstance(source, MixtureSource):
        yield from _read_mixture(source, reader, readers, size, position, options)
    epoch, file, group, row, without_text, damaged = position
    has_documents = True  # the first epoch may begin midway and proves nothing
    while True:
        while file < len(source.files):
            groups = _open(source, file, skip_damaged)
            if isinstance(groups, NotArrived):
                yield groups
                continue
            if groups is None:
                damaged += reader == 0  # once for all readers
                file, group, row = file + 1, reader, 0
                continue
            while group < len(groups):
                rows = itertools.islice(_rows(groups, group, skip_damaged), row, None)
                while taken := _take(rows, size, characters):
                    texts = [text for text in taken if isinstance(text, str)]
                    row += len(taken)
                    without_text += taken.count(None)
                    damaged += len(taken) - len(texts) - taken.count(None)
                    has_documents = has_documents or bool(texts)
                    yield StreamPosition(epoch, file, group, row, without_text, damaged), texts
                group, row = group + readers, 0
            file, group = file + 1, reader
        if not has_documents:
            raise ValueError(_no_document(source, reader, readers))
        epoch, file, has_documents = epoch + 1, 0, False


def _open(source: Source, file: int, skip_damaged: bool) -> RowGroups | NotArrived | None:
    """The row groups of a file; None if it is damaged and skip_damaged. Raises DamagedData."""
    try:
        return source.open(file)
    except DamagedData as error:
        if not skip_damaged:
            raise _with_remedy(error) from None
        return None


def _rows(groups: RowGroups, group: int, skip_damaged: bool) -> Iterator[str | None | DamagedData]:
    """The rows of a row group, and DamagedData for each damaged part, which is raised if not
    skip_damaged.
    """
    try:
        for row in groups.documents(group):
            if isinstance(row, DamagedData) and not skip_damaged:
                raise row
            yield row
    except DamagedData as error:
        if not skip_damaged:
            raise _with_remedy(error) from None
        yield error


def _with_remedy(error: DamagedData) -> DamagedData:
    remedy = "convert it to UTF-8" if "'utf-8' codec" in str(error) else "repair the file"
    return DamagedData(
        f"{error}; {remedy}, or leave out what is damaged with skip_corrupt_data=true"
    )


def _no_document(source: Source, reader: int, readers: int) -> str:
    """The error of a reader that has nothing to read in a whole epoch."""
    if readers > 1:
        return (
            f"{source.where}: no document for reader {reader} of data_readers={readers}; "
            "use fewer readers or check the files"
        )
    names = ", ".join(source.files[:2]) + ", ..." * (len(source.files) > 2)
    return f"{source.where}: no text in {names}; add text, or take such files away"


def _take(rows: Iterator[Any], size: int, characters: float) -> list[Any]:
    """The next rows: up to `size`, and to the one that reaches `characters`."""
    if math.isinf(characters):
        return list(itertools.islice(rows, size))
    taken: list[Any] = []
    while len(taken) < size and characters > 0 and (row := next(rows, _END)) is not _END:
        taken.append(row)
        characters -= len(row) if isinstance(row, str) else 0
    return taken


def _read_mixture(
    source: MixtureSource,
    reader: int,
    readers: int,
    size: int,
    position: MixturePosition,
    options: Mapping[str, Any],
) -> Iterator[tuple[MixturePosition, list[str]] | NotArrived]:
    """Lists of the parts, always from the part that is furthest below its share of the text."""
    lists = [
        read_lists(part, reader, readers, size, at, **options)
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


def usable_readers(source: Source, readers: int, skip_damaged: bool = False) -> int:
    """The largest divisor of `readers` with which each reader has something to read in `source`.

    Files that have not arrived are taken to be large enough; otherwise read_lists raises later.
    """
    if isinstance(source, MixtureSource):
        for part in source.parts:
            readers = usable_readers(part, readers, skip_damaged)
        return readers
    most = 1
    for file in range(len(source.files)):
        groups = _open(source, file, skip_damaged)
        most = readers if isinstance(groups, NotArrived) else max(most, len(groups or ()))
        if most >= readers:
            return readers
    return largest_divisor(readers, most)


# ---- All documents once -------------------------------------------------------------------------


def iterate_texts(config: Any, split: str) -> Iterator[str]:
    """Every document of the split once, in the order of the files (to train a tokenizer).

    The parts of a mixture keep their shares as long as all parts last; then the others follow.
    """
    return texts_of(open_source(config, split), config.skip_corrupt_data)


def texts_of(source: Source, skip_damaged: bool = False) -> Iterator[str]:
    """Every document of a source once, as iterate_texts."""
    if isinstance(source, MixtureSource):
        yield from _texts_of_mixture(source, skip_damaged)
        return
    patience, stopping = Patience(), threading.Event()
    for file in range(len(source.files)):
        while isinstance(groups := _open(source, file, skip_damaged), NotArrived):
            patience.wait(groups, stopping)
        for group in range(len(groups or ())):
            rows = _rows(groups, group, skip_damaged)
            yield from (row for row in rows if isinstance(row, str))


def _texts_of_mixture(source: MixtureSource, skip_damaged: bool) -> Iterator[str]:
    texts = [texts_of(part, skip_damaged) for part in source.parts]
    weights = list(source.weights)
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
