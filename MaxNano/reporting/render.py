"""A report as one offline HTML page and as Markdown, by the templates in templates/.

Every value that a template prints is escaped, also where a template forgets to ask for it. The page
has no script and may fetch nothing, which its Content-Security-Policy tells the browser.
"""

import base64
import functools
import hashlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jinja2
from markupsafe import Markup

from MaxNano.reporting import charts
from MaxNano.reporting.blocks import Block, Curves, Report, Table
from MaxNano.reporting.charts import Series, clean

TEMPLATES = Path(__file__).resolve().parent / "templates"
LONGEST_TEXT = 1500  # characters of a model's text; the number of the others is shown


def to_html(report: Report) -> str:
    """The report as one HTML page."""
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    template = _environment("html").get_template("report.html.jinja")
    return template.render(report=report, style=Markup(style), style_sha256=digest)


def to_markdown(report: Report) -> str:
    """The report as GitHub-flavored Markdown."""
    return _environment("markdown").get_template("report.md.jinja").render(report=report)


@functools.cache
def _environment(kind: str) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=True,  # no effect on what finalize marks as safe
        finalize={"html": _html_value, "markdown": _markdown_value}[kind],
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "groups": group_blocks,
        "shorten": shorten,
        "paragraph": paragraph,
        "fenced": fenced,
        "chart": chart,
        "curve_table": curve_table,
        "text_columns": text_columns,
        "class_names": charts.class_names,
    }
    return environment


# ---- Escaping -----------------------------------------------------------------------------------


def _html_value(value: Any) -> Any:
    """A printed value for jinja2's autoescape: cleaned text, or the SVG of an element."""
    if isinstance(value, Markup):
        return value
    if isinstance(value, ElementTree.Element):
        return Markup(ElementTree.tostring(value, encoding="unicode", method="html"))
    return clean(str(value))


def _markdown_value(value: Any) -> Any:
    """A printed value: what a filter made Markdown of, anything else escaped on one line."""
    return value if isinstance(value, Markup) else markdown(str(value))


def markdown(text: str) -> Markup:
    """A text on one line in which no character has a meaning in Markdown or HTML."""
    text = " ".join(clean(text).split())
    # Character references are literal text in Markdown.
    text = re.sub(r"[\\`*\[\]<>&|~#$]|(?<!\w)@", lambda match: f"&#{ord(match[0])};", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", "&#95;", text)
    return Markup(
        re.sub(
            r"(?i)(www)\.|:(?=//)",
            lambda match: f"{match[1] or ''}&#{46 if match[1] else 58};",
            text,
        )
    )


def paragraph(text: str) -> Markup:
    """A text that starts a line but no list."""
    escaped = str(markdown(text))
    return Markup(
        re.sub(r"^(\d*)([-+=.)])", lambda match: f"{match[1]}&#{ord(match[2])};", escaped)
    )


def fenced(text: str) -> Markup:
    """A text as a code block, which it cannot end."""
    text = clean(text)
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}text\n{text}\n{fence}")


# ---- Filters ------------------------------------------------------------------------------------


def shorten(text: str) -> str:
    """At most LONGEST_TEXT characters of a text."""
    excess = len(text) - LONGEST_TEXT
    return text if excess <= 0 else f"{text[:LONGEST_TEXT]} … ({excess:,} more characters)"


def group_blocks(blocks: Sequence[Block]) -> list[tuple[str, list[Block]]]:
    """Runs of blocks of the same type, as (name of the type, blocks)."""
    groups = itertools.groupby(blocks, type)
    return [(kind.__name__, list(members)) for kind, members in groups]


def text_columns(table: Table) -> list[int]:
    """Indices of the columns without graphics."""
    return [
        column
        for column in range(len(table.header))
        if all(isinstance(row[column], str) for row in table.rows)
    ]


def chart(curves: Curves) -> ElementTree.Element:
    """The SVG of curves, with their ends in words for screen readers."""
    ends = "; ".join(f"{series.name}: {_ends(series)}" for series in curves.series)
    label = f"{curves.title}: {ends}"
    return charts.line_chart(curves.series, label=label, from_zero=curves.from_zero)


def curve_table(group: Sequence[Curves]) -> Table:
    """Curves as rows of numbers and block characters."""
    rows = []
    for curves in group:
        for series in curves.series:
            values = [y for _, y in series.points if y is not None]
            ends = (values[0], values[-1], min(values), max(values)) if values else ()
            name = curves.title if len(curves.series) == 1 else f"{curves.title}, {series.name}"
            cells = map(_number, ends) if ends else [""] * 4
            rows.append([name, *cells, charts.sparkline(series.points)])
    return Table(("curve", "first", "last", "lowest", "highest", "over the steps"), rows)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _ends(series: Series) -> str:
    known = [point for point in series.points if point[1] is not None]
    if not known:
        return "no number"
    (first, start), (last, end) = known[0], known[-1]
    return f"{_number(start)} at step {first:,}, {_number(end)} at step {last:,}"
