"""Curves as inline SVG and as a line of text: no script, no fonts, colors by CSS classes.

Elements are those of xml.etree, which escapes every text and attribute when it writes them.
"""

import itertools
import math
import re
import statistics
from collections.abc import Sequence
from typing import NamedTuple
from xml.etree import ElementTree

WIDTH, HEIGHT = 440, 220
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 10, 36  # margins of the plot
BUCKETS = 300  # per line; each keeps its lowest and its highest value
BLOCKS = "▁▂▃▄▅▆▇█"
# Of the classes s0, s1 ... in a picture on its own, which may lie on a light or a dark page.
COLORS = "#c9531f #2f78c4 #3c8a4e #ad4fa2 #a58412 #128a92 #7566cf #857e76".split()

Points = Sequence[
    tuple[float, float | None]
]  # (x, y) by increasing x; y is None if there is no number


class Series(NamedTuple):
    """A line of a chart. style: line, faint (noisy, in the background) or dots (joined and marked)."""

    name: str
    points: Points
    style: str = "line"


# ---- Elements -----------------------------------------------------------------------------------


def clean(text: str) -> str:
    """The text with control characters and lone surrogates made visible, except line feeds and
    tabs.
    """
    text = text.replace("\r\n", "\n").encode("utf-8", "replace").decode()
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufffe\uffff]", _visible, text)


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    return chr(0x2400 + code) if code < 0x20 else "\ufffd"


def element(
    tag: str, attributes: dict[str, object] | None = None, *children: ElementTree.Element | str
) -> ElementTree.Element:
    """An element with attributes and children, which are elements or texts; texts are cleaned."""
    cleaned = {name: clean(str(value)) for name, value in (attributes or {}).items()}
    made = ElementTree.Element(tag, cleaned)
    for child in children:
        if not isinstance(child, str):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + clean(child)
        else:
            made.text = (made.text or "") + clean(child)
    return made


# ---- Numbers ------------------------------------------------------------------------------------


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers from low to high, spaced by 1, 2 or 5 times a power of ten."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * times for times in (1, 2, 5, 10) if span / (power * times) <= count)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(step * index, 12) for index in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """The ticks with enough decimals to differ, and with k, M or G if they are large."""
    largest = max(map(abs, values), default=0.0)
    units = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
    unit, name = next(((unit, name) for least, unit, name in units if largest >= least), (1.0, ""))
    steps = [abs(b - a) / unit for a, b in zip(values, values[1:], strict=False)]
    step = min(steps, default=largest / unit) or 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if decimals > 5:
        return [f"{value:.3g}" for value in values]
    return [f"{value / unit:,.{decimals}f}{name if value else ''}" for value in values]


def thin(points: Points, buckets: int = BUCKETS) -> list[tuple[float, float | None]]:
    """The lowest and the highest point of each bucket, in their order; gaps that fill a bucket
    remain.
    """
    if len(points) <= 2 * buckets:
        return list(points)
    thinned: list[tuple[float, float | None]] = []
    for start in range(buckets):
        part = points[start * len(points) // buckets : (start + 1) * len(points) // buckets]
        known = [point for point in part if point[1] is not None]
        if not known:
            thinned.append(part[0])
            continue
        ends = {min(known, key=lambda point: point[1]), max(known, key=lambda point: point[1])}
        thinned += sorted(ends)
    return thinned


def medians(points: Points, buckets: int = 40, least: int = 5) -> list[tuple[float, float]]:
    """Medians of at most `buckets` parts with at least `least` points each, at the middle of the
    part.
    """
    known = [point for point in points if point[1] is not None]
    buckets = min(buckets, -(-len(known) // least))
    middles = []
    for index in range(buckets):
        part = known[index * len(known) // buckets : (index + 1) * len(known) // buckets]
        middles.append((part[len(part) // 2][0], statistics.median(y for _, y in part)))
    return middles


def y_range(series: Sequence[Series], from_zero: bool) -> tuple[float, float]:
    """(lowest, highest) to draw, without spikes of a faint series far outside its middle 90 %."""
    values: list[float] = []
    for line in series:
        known = sorted(y for _, y in line.points if y is not None)
        if line.style == "faint" and known:
            bottom, top = known[len(known) // 20], known[-1 - len(known) // 20]
            known = [max(known[0], 2 * bottom - top), min(known[-1], 2 * top - bottom)]
        values += known
    low, high = min(values, default=0.0), max(values, default=1.0)
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    if low == high:
        low, high = low - abs(low) / 2 - 1e-9, high + abs(high) / 2 + 1e-9
    pad = 0.05 * (high - low)
    return (low if from_zero and low == 0 else low - pad), high + pad


# ---- Charts -------------------------------------------------------------------------------------


def line_chart(
    series: Sequence[Series], *, label: str, x_name: str = "step", from_zero: bool = False
) -> ElementTree.Element:
    """An <svg> with axes, ticks and one line per series, whose CSS class is from class_names().

    label: text for screen readers. Values beyond the axes are drawn at their edge.
    """
    xs = [x for line in series for x, _ in line.points]
    left, right = min(xs, default=0), max(xs, default=1)
    right = max(right, left + 1)
    right = max(
        [right, *(x for x in ticks(left, 1.01 * right) if x > right)]
    )  # the last step of 500 is 499
    low, high = y_range(series, from_zero)

    def place_x(x: float) -> float:
        return round(LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT), 1)

    def place_y(y: float) -> float:
        y = min(max(y, low), high)
        return round(HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    chart = element(
        "svg",
        {"class": "chart", "viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": label},
    )
    y_ticks, x_ticks = ticks(low, high), ticks(left, right)
    for value, text in zip(y_ticks, tick_labels(y_ticks), strict=True):
        y = place_y(value)
        chart.append(
            element("line", {"class": "grid", "x1": LEFT, "x2": WIDTH - RIGHT, "y1": y, "y2": y})
        )
        chart.append(element("text", {"class": "tick end", "x": LEFT - 6, "y": y + 4}, text))
    bottom = HEIGHT - BOTTOM
    for value, text in zip(x_ticks, tick_labels(x_ticks), strict=True):
        x = place_x(value)
        chart.append(
            element("line", {"class": "axis", "x1": x, "x2": x, "y1": bottom, "y2": bottom + 4})
        )
        chart.append(element("text", {"class": "tick middle", "x": x, "y": bottom + 17}, text))
    chart.append(
        element(
            "line", {"class": "axis", "x1": LEFT, "x2": WIDTH - RIGHT, "y1": bottom, "y2": bottom}
        )
    )
    chart.append(
        element(
            "text",
            {"class": "tick middle", "x": (LEFT + WIDTH - RIGHT) / 2, "y": HEIGHT - 4},
            x_name,
        )
    )

    for line, name in zip(series, class_names(series), strict=True):
        points = [(place_x(x), None if y is None else place_y(y)) for x, y in thin(line.points)]
        chart.append(element("path", {"class": name, "d": _path(points)}))
        for x, y in line.points if line.style == "dots" else ():
            if y is not None:
                title = element("title", {}, f"{line.name}, {x_name} {x:,}: {y:.6g}")
                chart.append(
                    element(
                        "circle", {"class": name, "cx": place_x(x), "cy": place_y(y), "r": 3}, title
                    )
                )
    return chart


def picture(
    series: Sequence[Series], *, title: str, from_zero: bool = False
) -> ElementTree.Element:
    """The chart as an <svg> of its own, with title, legend and colors."""
    top = 26 + 18 * len(series)
    rules = [
        "text { font: 12px system-ui, sans-serif; fill: #777 }",
        "path { fill: none; stroke-width: 2 } .faint { stroke: #999; stroke-width: 1 }",
        ".grid { stroke: #8884 } .axis { stroke: #888 }",
        ".end { text-anchor: end } .middle { text-anchor: middle }",
    ]
    for number, color in enumerate(COLORS):
        rules.append(f"path.s{number} {{ stroke: {color} }} circle.s{number} {{ fill: {color} }}")
    parts = [element("style", {}, " ".join(rules)), element("text", {"x": LEFT, "y": 16}, title)]
    for row, (line, name) in enumerate(zip(series, class_names(series), strict=True)):
        y = 34 + 18 * row
        parts.append(element("path", {"class": name, "d": f"M{LEFT} {y - 4}h14"}))
        parts.append(element("text", {"x": LEFT + 22, "y": y}, line.name))
    chart = line_chart(series, label=title, from_zero=from_zero)
    chart.attrib |= {"y": str(top), "width": str(WIDTH), "height": str(HEIGHT)}
    box = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {WIDTH} {top + HEIGHT}"}
    return element("svg", box, *parts, chart)


def class_names(series: Sequence[Series]) -> list[str]:
    """The CSS class of each series: faint, or one of s0, s1 ... in turn, as many as COLORS."""
    numbers = itertools.cycle(range(len(COLORS)))
    return ["faint" if line.style == "faint" else f"s{next(numbers)}" for line in series]


def _path(points: Points) -> str:
    """The points as an SVG path with a gap for each missing number."""
    words, pen = [], "M"
    for x, y in points:
        if y is None:
            pen = "M"
            continue
        words.append(f"{pen}{x:g} {y:g}")
        pen = "L"
    return "".join(words)


def bar(
    value: float, marks: Sequence[float], *, low: float, high: float, label: str
) -> ElementTree.Element:
    """A small <svg> for a table cell: a bar from 0 to value, and marks of the classes m0, m1 ..."""
    width, height = 130, 16

    def place(number: float) -> float:
        return round(2 + (min(max(number, low), high) - low) / (high - low) * (width - 4), 1)

    zero, end = place(0), place(value)
    chart = element(
        "svg",
        {"class": "bar", "viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": label},
    )
    chart.append(element("line", {"class": "axis", "x1": zero, "x2": zero, "y1": 0, "y2": height}))
    size = {"x": min(zero, end), "y": 4, "width": round(abs(end - zero), 1), "height": 8}
    chart.append(element("rect", {"class": "value", **size}))
    for number, mark in enumerate(marks):
        x = place(mark)
        chart.append(
            element(
                "line", {"class": f"mark m{number}", "x1": x, "x2": x, "y1": 1, "y2": height - 1}
            )
        )
    return chart


def sparkline(points: Points, width: int = 32) -> str:
    """The curve as a line of block characters, each the median of a part."""
    values = [y for _, y in medians(points, width, least=1)]
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in values)
