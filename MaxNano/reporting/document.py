"""A document of a few kinds of blocks, written as one offline HTML file and as Markdown.

Blocks hold plain texts, which may be a model's: both writers escape all of them, and nothing else makes markup. The
page has no script and may fetch nothing, and says so to the browser too.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from MaxNano.reporting import charts
from MaxNano.reporting.charts import Series, clean, element

STYLE = Path(__file__).resolve().parent / "templates" / "report.css"
LONGEST_TEXT = 1500  # characters of one text of a model; the rest is only counted

# ---- Blocks ----------------------------------------------------------------------------------------------------------


class Note(NamedTuple):
    """A paragraph in small type."""

    text: str


class Missing(NamedTuple):
    """One line that says what is not there."""

    text: str


class Tiles(NamedTuple):
    """The numbers that matter most: (name, value, what to compare it with)."""

    tiles: Sequence[tuple[str, str, str]]


class Table(NamedTuple):
    """Rows of texts; a cell may also be a graphic, which Markdown leaves out. numeric: all but the first column are."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | ElementTree.Element]]
    numeric: bool = True


class Curves(NamedTuple):
    """A chart with a title, a caption, and a legend where it has several lines."""

    title: str
    series: Sequence[Series]
    caption: str = ""
    from_zero: bool = False


class Speech(NamedTuple):
    """What was said, in turns: (who, text), and a remark below."""

    title: str
    turns: Sequence[tuple[str, str]]
    remark: str = ""


class Heading(NamedTuple):
    """A heading within a section."""

    text: str


class Folded(NamedTuple):
    """A long text as it stands, shown when it is asked for."""

    title: str
    text: str


Block = Note | Missing | Tiles | Table | Curves | Speech | Heading | Folded


class Section(NamedTuple):
    """A part of the document."""

    title: str
    blocks: Sequence[Block]


class Document(NamedTuple):
    """All of it."""

    title: str
    subtitle: str
    sections: Sequence[Section]


# ---- Text ------------------------------------------------------------------------------------------------------------


def shorten(text: str) -> str:
    """At most LONGEST_TEXT characters of a text."""
    left = len(text) - LONGEST_TEXT
    return text if left <= 0 else f"{text[:LONGEST_TEXT]} … ({left:,} more characters)"


# ---- HTML ------------------------------------------------------------------------------------------------------------


def to_html(document: Document) -> str:
    """The document as one HTML page."""
    style = STYLE.read_text(encoding="utf-8")
    allowed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
    )
    head = element(
        "head",
        {},
        element("meta", {"charset": "utf-8"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": policy}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"name": "color-scheme", "content": "light dark"}),
        element("title", {}, document.title),
        element("style", {}, style),
    )
    links = [
        element("a", {"href": f"#part-{number}"}, section.title)
        for number, section in enumerate(document.sections)
    ]
    header = element(
        "header",
        {},
        element("h1", {}, document.title),
        element("p", {}, document.subtitle),
        element("nav", {"aria-label": "Parts"}, *links),
    )
    parts = [
        element(
            "section",
            {"id": f"part-{number}"},
            element("h2", {}, section.title),
            *_html_blocks(section),
        )
        for number, section in enumerate(document.sections)
    ]
    page = element(
        "html", {"lang": "en"}, head, element("body", {}, header, element("main", {}, *parts))
    )
    return (
        "<!DOCTYPE html>\n" + ElementTree.tostring(page, encoding="unicode", method="html") + "\n"
    )


def _html_blocks(section: Section) -> list[ElementTree.Element]:
    """The blocks; those of one kind that stand beside each other go into a grid."""
    made: list[ElementTree.Element] = []
    for block in section.blocks:
        one = _html(block)
        grid = {Curves: "charts", Speech: "speeches"}.get(type(block))
        if grid is None:
            made.append(one)
        elif made and made[-1].get("class") == grid:
            made[-1].append(one)
        else:
            made.append(element("div", {"class": grid}, one))
    return made


def _html(block: Block) -> ElementTree.Element:
    match block:
        case Note(text):
            return element("p", {"class": "note"}, text)
        case Missing(text):
            return element("p", {"class": "missing"}, text)
        case Heading(text):
            return element("h3", {}, text)
        case Tiles(tiles):
            return element("dl", {"class": "tiles"}, *(_html_tile(*tile) for tile in tiles))
        case Table(header, rows, numeric):
            return _html_table(header, rows, numeric)
        case Curves():
            return _html_curves(block)
        case Speech(title, turns, remark):
            lines = [
                element(
                    "div",
                    {"class": f"turn {who}"},
                    element("b", {}, who),
                    element("pre", {}, shorten(text)),
                )
                for who, text in turns
            ]
            remarks = [element("p", {"class": "remark"}, shorten(remark))] if remark else []
            return element(
                "article", {"class": "speech"}, element("h4", {}, title), *lines, *remarks
            )
        case Folded(title, text):
            return element("details", {}, element("summary", {}, title), element("pre", {}, text))


def _html_tile(name: str, value: str, beside: str) -> ElementTree.Element:
    facts = element("dd", {}, element("strong", {}, value), element("span", {}, beside))
    return element("div", {}, element("dt", {}, name), facts)


def _html_table(header, rows, numeric) -> ElementTree.Element:
    def line(tag, cells):
        return element("tr", {}, *(element(tag, {}, cell) for cell in cells))

    table = element(
        "table",
        {"class": "numbers" if numeric else "texts"},
        element("thead", {}, line("th", header)),
        element("tbody", {}, *(line("td", row) for row in rows)),
    )
    # A region that scrolls can be reached by keyboard.
    return element(
        "div",
        {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": header[0]},
        table,
    )


def _html_curves(block: Curves) -> ElementTree.Element:
    names = [
        element("span", {"class": f"key {name}"}, one.name)
        for one, name in zip(block.series, charts.class_names(block.series), strict=True)
    ]
    caption = element(
        "figcaption", {}, element("b", {}, block.title), *(names if len(names) > 1 else ())
    )
    label = "; ".join(f"{one.name}: {_ends(one)}" for one in block.series)
    chart = charts.line_chart(
        block.series, label=f"{block.title}: {label}", from_zero=block.from_zero
    )
    notes = [element("p", {"class": "note"}, block.caption)] if block.caption else []
    return element("figure", {}, caption, chart, *notes)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _ends(series: Series) -> str:
    """The first and the last number of a series, in words."""
    known = [point for point in series.points if point[1] is not None]
    if not known:
        return "no number"
    (first, start), (last, end) = known[0], known[-1]
    return f"{_number(start)} at step {first:,}, {_number(end)} at step {last:,}"


# ---- Markdown --------------------------------------------------------------------------------------------------------


def to_markdown(document: Document) -> str:
    """The document as Markdown (GitHub's, with tables); a curve becomes a row of block characters."""
    parts = [f"# {markdown(document.title)}", _paragraph(document.subtitle)]
    for section in document.sections:
        parts.append(f"## {markdown(section.title)}")
        curves: list[Curves] = []
        for block in [*section.blocks, None]:
            if isinstance(block, Curves):
                curves.append(block)
                continue
            if curves:
                parts.append(_markdown_curves(curves))
                curves = []
            if isinstance(block, Missing) and parts[-1].startswith("- "):
                parts[-1] += "\n" + _markdown(block)
            elif block is not None:
                parts.append(_markdown(block))
    return "\n\n".join(parts) + "\n"


def markdown(text: str) -> str:
    """A text on one line in which no character means anything to Markdown or HTML; most stay as they are."""
    text = " ".join(clean(text).split())
    # Entities stand for their character and for nothing else.
    text = re.sub(r"[\\`*\[\]<>&|~#$]|(?<!\w)@", lambda match: f"&#{ord(match[0])};", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", "&#95;", text)
    return re.sub(
        r"(?i)(www)\.|:(?=//)", lambda match: f"{match[1] or ''}&#{46 if match[1] else 58};", text
    )


def _paragraph(text: str) -> str:
    """A text that begins a line, but no list."""
    return re.sub(r"^(\d*)([-+=.)])", lambda match: f"{match[1]}&#{ord(match[2])};", markdown(text))


def _markdown(block: Block) -> str:
    match block:
        case Note(text):
            return _paragraph(text)
        case Missing(text):
            return f"- {_paragraph(text)}"
        case Heading(text):
            return f"### {markdown(text)}"
        case Tiles(tiles):
            return "\n".join(
                f"- {_paragraph(name)}: **{markdown(value)}**{f' ({markdown(beside)})' if beside else ''}"
                for name, value, beside in tiles
            )
        case Table(header, rows, numeric):
            return _markdown_table(header, rows, numeric)
        case Speech(title, turns, remark):
            lines = [f"**{markdown(title)}**"]
            lines += [f"{_paragraph(who)}:\n\n{fenced(shorten(text))}" for who, text in turns]
            return "\n\n".join(lines + ([_paragraph(shorten(remark))] if remark else []))
        case Folded(title, text):
            return f"<details><summary>{markdown(title)}</summary>\n\n{fenced(text)}\n\n</details>"


def fenced(text: str) -> str:
    """A text as a block of code, which it cannot end."""
    text = clean(text)
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _markdown_table(header, rows, numeric) -> str:
    kept = [
        column for column in range(len(header)) if all(isinstance(row[column], str) for row in rows)
    ]  # the others are graphics
    rule = ["---" if not numeric or column == kept[0] else "--:" for column in kept]
    lines = [[markdown(header[column]) for column in kept], rule]
    lines += [[markdown(row[column]) for column in kept] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_curves(curves: Sequence[Curves]) -> str:
    rows = []
    for one in curves:
        for series in one.series:
            values = [y for _, y in series.points if y is not None]
            ends = (values[0], values[-1], min(values), max(values)) if values else ()
            name = one.title if len(one.series) == 1 else f"{one.title}, {series.name}"
            rows.append(
                [name, *(map(_number, ends) if ends else [""] * 4), charts.sparkline(series.points)]
            )
    return _markdown_table(
        ("curve", "first", "last", "lowest", "highest", "from left to right"), rows, True
    )
