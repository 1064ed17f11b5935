"""Printing for people: warnings, errors on one line, tables. Imports the standard library only."""

import io
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

PLAIN_WIDTH = 120  # columns of a table if stdout is not a terminal
UNFOLDED_WIDTH = 100_000  # no cell is folded, so that programs find whole names


def one_line(error: BaseException | str, limit: int | None = None) -> str:
    """The text of an error, or any text, on one line; the name of the error's type if it has no
    text.

    A text over `limit` characters loses its middle, because causes are at the end.
    """
    text = " ".join(str(error).split())
    if not text and isinstance(error, BaseException):
        text = type(error).__name__
    if limit is None or len(text) <= limit:
        return text
    head = limit // 3
    return f"{text[:head]} ... {text[head + 5 - limit :]}"


def bytes_text(size: float) -> str:
    """A number of bytes in the largest unit that it reaches: 3.1 GB, 640.0 kB."""
    for unit, text in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {text}"
    return f"{size / 1e3:.1f} kB"


def type_and_text(error: BaseException) -> str:
    """An error of another library on one line, at most 300 characters: `TimeoutError: no answer`."""
    return one_line(f"{type(error).__name__}: {error}".rstrip(": "), 300)


def warn(line: str) -> None:
    """Print a warning to stderr."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


def keep_output() -> None:
    """Makes stdout and stderr lose what they cannot take, so that no print raises or ends a program.

    That is: the reader of a pipe has gone, the terminal has closed, the disk is full, or a character
    is not in the encoding. Output that works again is written again. A stream that was closed at the
    start is discarded. Other streams, such as those of pytest, stay as they are.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            file = _LossyFile(stream.fileno(), "w", closefd=False)
            # Unbuffered (python -u), the text layer writes to the file itself.
            is_raw = isinstance(stream.buffer, io.RawIOBase)
            lossy = io.TextIOWrapper(
                file if is_raw else io.BufferedWriter(file),
                encoding=stream.encoding,
                errors="replace",
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, lossy)


def exit_now(status: int) -> None:
    """End the process although a thread still works in JAX, which the interpreter would wait for or
    crash on.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _LossyFile(io.FileIO):
    """A descriptor whose writes never fail: what cannot be written is lost."""

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None  # as for a pipe that is full and does not block
        return memoryview(data).nbytes if written is None else written


def print_table(
    title: str,
    header: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    plain_width: int = PLAIN_WIDTH,
) -> None:
    """Print a table to stdout, as format_table."""
    print(format_table(title, header, rows, plain_width=plain_width), end="\n\n", flush=True)


def format_table(
    title: str,
    header: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    plain_width: int = PLAIN_WIDTH,
) -> str:
    """A table as text, as wide as stdout if that is a terminal; cells may be of any type.

    Elsewhere plain_width is the number of columns, in which long cells are folded.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=plain_width)
    table = Table(
        title=Text(title), title_justify="left", box=None, pad_edge=False, header_style="bold"
    )
    for name in header:
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
