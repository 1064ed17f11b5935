"""Formats without row groups, JSON lines and running text: read in blocks of BLOCK_BYTES.

A block can be reached without reading the file up to it, so that several readers share a file.
"""

import io
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from MaxNano.data.folder import DamagedData, Folder, decode, naming, open_file

# These sizes decide which documents a reader gets and where they begin: other values would change
# the order of the data.
BLOCK_BYTES = 1 << 17
# Running text is cut at the first blank line after this many characters, and at any line after the
# maximum; a line that is longer is cut where the text allows it best.
TEXT_DOCUMENT_CHARACTERS = 4_000
TEXT_DOCUMENT_MAX_CHARACTERS = 16_000

# Where to cut text without line feeds, best first: between paragraphs and pages, at other line
# ends, after a sentence, between words. The first three exist for bytes too.
_PARAGRAPH_END = r"\r\s*\r|[\f\v]"
_LINE_END = r"\r"
_SENTENCE_END = r"[.!?][\"')\]]*\s"
_TEXT_ENDS = tuple(
    map(
        re.compile,
        (
            rf"\n\s*\n|\u2029|{_PARAGRAPH_END}",
            r"[\n\r\x85\u2028]",
            r"[.!?…][\"')\]’”»]*\s|[。！？][」』”’]*",
            r"\s",
        ),
    )
)
_BYTE_ENDS = tuple(
    re.compile(pattern.encode()) for pattern in (_PARAGRAPH_END, _LINE_END, _SENTENCE_END, r"\s")
)

_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # of UTF-8 characters, after their first byte
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}


class _Blocks:
    """A file in blocks of BLOCK_BYTES; group g has what begins in block g."""

    def __init__(self, file: io.RawIOBase, path: str):
        self.path = path
        with naming(path):
            self._file = io.BufferedReader(file, BLOCK_BYTES)
            self._size = self._file.seek(0, os.SEEK_END)

    def __len__(self) -> int:
        return (self._size + BLOCK_BYTES - 1) // BLOCK_BYTES


class _LineFolder(Folder):
    """A folder of files of lines, which may be compressed.

    Compressed files cannot be read from the middle: the last two that were opened are kept
    decompressed, in temporary files.
    """

    def __init__(self, config: Any, split: str, folder: str | None = None):
        super().__init__(config, split, folder)
        self._decompressed: dict[str, Any] = {}  # path -> temporary file

    def open_lines(self, path: str) -> io.RawIOBase:
        """Open a file to read and seek. Raises DamagedData."""
        compression = _COMPRESSION.get(os.path.splitext(path)[1])
        with naming(path):
            if compression is None:
                return open_file(self.filesystem, path)
            if path not in self._decompressed:
                self._decompressed = dict(list(self._decompressed.items())[-1:])
                self._decompressed[path] = _decompress(self.filesystem, path, compression)
            return open(self._decompressed[path].name, "rb", buffering=0)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_decompressed": {}}


def _decompress(filesystem: pafs.FileSystem, path: str, compression: str) -> Any:
    """A temporary file with the content of a compressed one; it exists as long as the object."""
    target = tempfile.NamedTemporaryFile(prefix="maxnano_")  # noqa: SIM115 (kept by the caller)
    with (
        open_file(filesystem, path) as file,
        pa.CompressedInputStream(file, compression) as content,
    ):
        while chunk := content.read(1 << 20):
            target.write(chunk)
    target.flush()
    return target


# ---- JSON lines ---------------------------------------------------------------------------------


class JsonlSource(_LineFolder):
    """One JSON object per line; its field `text_column` is the document. Empty lines are skipped."""

    endings = (".jsonl", ".jsonl.gz", ".jsonl.zst")

    def open_path(self, path: str) -> "_JsonlBlocks":
        is_told = not self._config.skip_corrupt_data
        return _JsonlBlocks(self.open_lines(path), path, self.column, is_told)


class _JsonlBlocks(_Blocks):
    """Group g has the lines that begin in block g. is_told: damage is reported, with its line."""

    def __init__(self, file: io.RawIOBase, path: str, field: str, is_told: bool):
        super().__init__(file, path)
        self._field, self._is_told = field, is_told

    def documents(self, group: int) -> Iterator[str | None | DamagedData]:
        begin, end = group * BLOCK_BYTES, (group + 1) * BLOCK_BYTES
        missing, is_present = None, False
        with naming(self.path):
            # From the byte before: if that one ends a line, the line at `begin` is ours.
            offset = self._file.seek(max(0, begin - 1))
            if begin:
                offset += len(self._file.readline())
            while offset < end and (line := self._file.readline()):
                start, offset = offset, offset + len(line)
                line = line.removeprefix(_BYTE_ORDER_MARK)
                if not line.strip():
                    continue
                try:
                    record = _parse(line)
                except ValueError as error:
                    where = self._line_at(start) if self._is_told else self.path
                    yield DamagedData(f"{where}: cannot be read ({error})")
                    continue
                text = record.get(self._field) if isinstance(record, dict) else record
                if not isinstance(record, dict) or not isinstance(text, str | None):
                    raise self._no_text(start, record)
                yield text
                is_present = is_present or self._field in record
                missing = missing or (start, record)
        if missing and not is_present:  # in none of the lines: it has another name
            raise self._no_text(*missing)

    def _no_text(self, start: int, record: Any) -> ValueError:
        record = record if isinstance(record, dict) else {}
        texts = ", ".join(name for name, value in record.items() if isinstance(value, str))
        return ValueError(
            f"{self._line_at(start)}: no text in field {self._field!r}; set text_column to "
            + (f"one of {texts}" if texts else "the field that holds it")
        )

    def _line_at(self, start: int) -> str:
        """The line that begins at a byte, in words. Reads the file up to it, to count lines."""
        number, rest = 1, start
        self._file.seek(0)
        while rest and (chunk := self._file.read(min(rest, BLOCK_BYTES))):
            number, rest = number + chunk.count(b"\n"), rest - len(chunk)
        self._file.readline()  # as the caller has done
        return f"{self.path}, line {number}"


def _parse(line: bytes) -> Any:
    """A line's JSON value. Raises ValueError with the reason why there is none."""
    try:
        return json.loads(decode(line))
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}, column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:  # not UTF-8, or an integer of thousands of digits
        raise ValueError(str(error).splitlines()[0]) from None


# ---- Running text -------------------------------------------------------------------------------


class TextSource(_LineFolder):
    """Running text, cut at blank lines into documents of a few thousand characters.

    A file is not one document: all readers share it, and training sees its documents in many rows.
    """

    endings = (".txt", ".md")

    def open_path(self, path: str) -> "_TextBlocks":
        return _TextBlocks(self.open_lines(path), path)


class _TextBlocks(_Blocks):
    """Group g has the text from the first cut in block g to the first cut in the next block."""

    def documents(self, group: int) -> Iterator[str]:
        with naming(self.path):
            begin, end = self._first_cut(group), self._first_cut(group + 1)
            self._file.seek(begin)
            text = decode(self._file.read(end - begin).removeprefix(_BYTE_ORDER_MARK))
        yield from cut_lines(text)

    def _first_cut(self, block: int) -> int:
        """The offset at which the first line begins in a block; the end of the file if the last
        line began before. In a line that fills the block, the best other place to cut.
        """
        begin = block * BLOCK_BYTES
        if begin == 0 or begin >= self._size:
            return min(begin, self._size)
        self._file.seek(begin - 1)
        content = self._file.read(BLOCK_BYTES + 1)
        feed = content.find(b"\n")
        if feed >= 0:
            return begin + feed
        if len(content) <= BLOCK_BYTES:
            return self._size
        for pattern in _BYTE_ENDS:
            if match := pattern.search(content):
                return begin - 1 + match.end()
        rest = content[1:]
        return begin + len(rest) - len(rest.lstrip(_CONTINUATION_BYTES))


def cut_lines(text: str) -> Iterator[str]:
    """Documents of a text, in order and without whitespace around them; nothing else is lost.

    A document ends at a blank line after TEXT_DOCUMENT_CHARACTERS, or at the end of a line after
    TEXT_DOCUMENT_MAX_CHARACTERS. A line that is longer than that is cut by itself.
    """
    lines, characters = [], 0
    for line in io.StringIO(text, newline="\n"):
        lines.append(line)
        characters += len(line)
        at_blank = not line.strip() and characters >= TEXT_DOCUMENT_CHARACTERS
        if at_blank or characters >= TEXT_DOCUMENT_MAX_CHARACTERS:
            is_long = len(line) > TEXT_DOCUMENT_MAX_CHARACTERS
            pieces = cut_text(lines.pop()) if is_long else ()
            yield from _stripped(["".join(lines), *pieces])
            lines, characters = [], 0
    yield from _stripped(["".join(lines)])


def cut_text(text: str) -> Iterator[str]:
    """Pieces that together are the text, in order: the whole text, or if it is longer than
    TEXT_DOCUMENT_MAX_CHARACTERS, pieces of TEXT_DOCUMENT_CHARACTERS or a little more, which end
    where the text allows it best. See _TEXT_ENDS.
    """
    begin = 0
    is_long = len(text) > TEXT_DOCUMENT_MAX_CHARACTERS
    while is_long and len(text) - begin > 2 * TEXT_DOCUMENT_CHARACTERS:
        window = begin + TEXT_DOCUMENT_CHARACTERS, begin + TEXT_DOCUMENT_MAX_CHARACTERS
        matches = (pattern.search(text, *window) for pattern in _TEXT_ENDS)
        end = next((match.end() for match in matches if match), window[1])
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _stripped(texts: Iterable[str]) -> list[str]:
    return [stripped for text in texts if (stripped := text.strip())]
