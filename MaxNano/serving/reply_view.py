"""A reply in the terminal while it grows: Markdown, wrapped between words.

Blocks that are complete (paragraphs, lists, tables, ...) are printed once and scroll like any
output. The block that still grows is drawn again at each update, in a region below them that is
never taller than the terminal, with a status line.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Self

from markdown_it import MarkdownIt
from rich.console import Console, Group
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment, SegmentLines
from rich.text import Text

from MaxNano.inference.dialogue import ReplyPart
from MaxNano.serving.terminal_chat import CONTROL_CHARACTERS, separator

# Text in angle brackets is text: rich would drop HTML.
PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
RESERVED_LINES = 3  # of the terminal, for the status line and the cursor


class _ReplyMarkdown(Markdown):
    """rich's Markdown; keeps line breaks and shows the addresses of links."""

    def __init__(self, text: str):
        super().__init__("", code_theme="ansi_dark", hyperlinks=False)
        self.parsed = PARSER.parse(text)
        for block in self.parsed:
            for token in block.children or ():
                if token.type == "softbreak":
                    token.type = "hardbreak"


def split_markdown(text: str) -> list[str]:
    """The blocks of a text: all but the last are complete, whatever follows."""
    tokens = PARSER.parse(text)
    starts = {token.map[0] for token in tokens if token.level == 0 and token.map}
    lines = text.split("\n")
    cuts = [0, *sorted(starts - {0})[min(starts, default=0) > 0 :], len(lines)]
    return ["\n".join(lines[start:end]) for start, end in itertools.pairwise(cuts)]


def split_lines(text: str) -> list[str]:
    """The complete lines, if there are any, and the rest."""
    return text.rsplit("\n", 1)


class ReplyView:
    """Shows one reply; use it within a `with` block."""

    def __init__(self, console: Console, is_markdown: bool):
        self._console = console
        self._is_markdown = is_markdown
        self._live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self._kind = "text"  # of the last part
        self._text = ""  # of the growing block
        self._printed = 0  # lines of that block that are above the region
        self._is_first = True  # nothing is printed yet

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Print what is left and remove the region."""
        if self._kind != "text":
            self._text += self._separator("text")
        self._live.update("")
        self._print(self._lines(self._text)[self._printed :])
        self._live.stop()

    def note(self, text: str) -> None:
        """Print a line above the reply."""
        self._console.print(Text(text, style="dim"))

    def update(self, parts: Sequence[ReplyPart], status: str) -> None:
        """Add parts to the reply and show the status line."""
        for part in parts:
            if part.kind != self._kind:
                self._text += self._separator(part.kind)
                self._kind = part.kind
            text = CONTROL_CHARACTERS.sub("", part.text)
            self._text += text if part.kind == "text" else text.replace("`", "'")
        split = split_markdown if self._is_markdown else split_lines
        *done, self._text = split(self._text)
        for block in done:
            self._print(self._lines(block)[self._printed :])
            self._printed, self._is_first = 0, False
        lines = self._lines(self._text)
        # A block that outgrows the region moves up line by line.
        overflow = len(lines) - max(1, self._console.height - RESERVED_LINES)
        if overflow > self._printed:
            self._print(lines[self._printed : overflow])
            self._printed = overflow
        line = Text(CONTROL_CHARACTERS.sub("", status), "dim", no_wrap=True, overflow="ellipsis")
        rest_lines = SegmentLines(lines[self._printed :], new_lines=True)
        self._live.update(Group(rest_lines, line), refresh=True)

    def _separator(self, kind: str) -> str:
        """The text before a part of this kind. In Markdown a tool call is code."""
        text = separator(self._kind, kind)
        if not self._is_markdown:
            return text
        return f"{'`' * (self._kind == 'text')}{text}{'`' * (kind == 'text')}"

    def _lines(self, text: str) -> list[list[Segment]]:
        """The block as lines of the terminal; in Markdown an empty line separates it from others."""
        if not self._is_markdown:
            return self._console.render_lines(Text(text), pad=False) if text else []
        lines = self._console.render_lines(_ReplyMarkdown(text), pad=False)
        # rich surrounds code with empty lines, and begins a list with one.
        used = [bool("".join(segment.text for segment in line).strip()) for line in lines]
        if not any(used):
            return []
        first, last = used.index(True), len(used) - used[::-1].index(True)
        return [[]] * (not self._is_first) + lines[first:last]

    def _print(self, lines: list[list[Segment]]) -> None:
        if lines:
            self._console.print(SegmentLines(lines, new_lines=True), end="")
