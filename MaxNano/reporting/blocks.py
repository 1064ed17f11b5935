"""What a report consists of: plain data that the templates show as HTML and as Markdown.

All texts are plain and may be a model's: render.py escapes them.
"""

from collections.abc import Sequence
from typing import NamedTuple
from xml.etree import ElementTree

from MaxNano.reporting.charts import Series


class Note(NamedTuple):
    """A paragraph in small type."""

    text: str


class Missing(NamedTuple):
    """A line on something that was not done or not recorded."""

    text: str


class Tile(NamedTuple):
    """A number of the overview, and what to compare it with."""

    name: str
    value: str
    comparison: str = ""


class Tiles(NamedTuple):
    """The numbers that matter most."""

    tiles: Sequence[Tile]


class Table(NamedTuple):
    """Rows of texts. A cell may be an SVG element, whose column Markdown omits.

    numeric: all columns but the first are numbers.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str | ElementTree.Element]]
    numeric: bool = True


class Curves(NamedTuple):
    """A chart; Markdown shows a row of block characters.

    image: name of a file with the chart next to the report, which Markdown shows too.
    """

    title: str
    series: Sequence[Series]
    caption: str = ""
    from_zero: bool = False
    image: str = ""


class Speech(NamedTuple):
    """A dialogue in turns (speaker, text), with a remark below."""

    title: str
    turns: Sequence[tuple[str, str]]
    remark: str = ""


class Heading(NamedTuple):
    """A heading within a section."""

    text: str


class Folded(NamedTuple):
    """A long preformatted text, shown on demand."""

    title: str
    text: str


Block = Note | Missing | Tiles | Table | Curves | Speech | Heading | Folded


class Section(NamedTuple):
    """A part of the report."""

    title: str
    blocks: Sequence[Block]


class Report(NamedTuple):
    """The whole report."""

    title: str
    subtitle: str
    sections: Sequence[Section]
