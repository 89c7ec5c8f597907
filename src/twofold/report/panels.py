"""Small figures side by side with one scale of values: points with intervals, lines and bands, for parts of a report about one question."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from twofold.report.drawing import Scale, bottom_axis, group, horizontal_grid, path, span, svg, tag, text_width

LEFT, TOP, BOTTOM, GAP = 58.0, 30.0, 56.0, 18.0
HEIGHT = 230.0
LEGEND_LINE = 20.0
DODGE = 7.0


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A mean at ``x`` with its interval (NaN ends: none); ``is_open`` draws it hollow."""

    x: float
    mean: float
    low: float
    high: float
    is_open: bool = False


@dataclass(frozen=True, kw_only=True)
class Series:
    """What has one colour and one name: marks, and a line with its band, rows of (x, mean, low, high)."""

    label: str
    colour: int
    marks: tuple[Mark, ...]
    line: tuple[tuple[float, float, float, float], ...] = ()
    joins_marks: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One of the figures, and how many pixels apart the marks of its series stand at the same x."""

    title: str
    series: tuple[Series, ...]


@dataclass(frozen=True, kw_only=True)
class XAxis:
    """What all panels share below: the range of x, the ticks that may be shown, their words, and what x is."""

    low: float
    high: float
    is_log: bool
    ticks: tuple[float, ...]
    name: Callable[[float], str]
    title: str


def panels(shown: Sequence[Panel], width: float, *, x: XAxis, y_title: str, label: str, columns: int = 3) -> Markup:
    """The figure as SVG, one column where it is narrow. ``label`` says in words what is in it."""
    columns = 1 if width < 600 else min(columns, len(shown))
    legend, legend_height = _legend(shown, width)
    top = 22.0 + legend_height
    each = (width - LEFT - GAP * (columns - 1)) / columns
    row_height = TOP + HEIGHT + BOTTOM
    parts: list[Markup] = [tag("text", y_title, x=0.0, y=14.0, class_="axis-title"), *legend]
    low, high = _ends(shown)
    for number, panel in enumerate(shown):
        row, column = divmod(number, columns)
        left, base = LEFT + column * (each + GAP), top + row * row_height + TOP
        y = Scale(low=low, high=high, start=base + HEIGHT, end=base)
        across = Scale(low=x.low, high=x.high, start=left + 14, end=left + each - 14, is_log=x.is_log)
        parts += _panel(panel, across, y, x, left, left + each)
    height = top + math.ceil(len(shown) / columns) * row_height
    return svg(parts, width, height, label=label, class_="panels")


def _ends(shown: Sequence[Panel]) -> tuple[float, float]:
    """The ends of the axis of values, which all panels share; 0 is on it."""
    marks = [mark for panel in shown for series in panel.series for mark in series.marks]
    if not marks:
        return -1.0, 1.0
    return span([0.0, *(mark.mean for mark in marks)], [(mark.low, mark.high) for mark in marks], most=1.5)


def _panel(panel: Panel, across: Scale, y: Scale, x: XAxis, left: float, right: float) -> Iterator[Markup]:
    yield tag("text", panel.title, x=left, y=y.end - 10, class_="row-heading")
    yield horizontal_grid(y, left, right) if left == LEFT else _plain_grid(y, left, right)
    yield bottom_axis(across, _fitting(x, across), y.start, x.name)
    yield tag("text", x.title, x=(left + right) / 2, y=y.start + 38, class_="axis-title", text_anchor="middle")
    if y.holds(0.0):
        yield tag("line", x1=left, x2=right, y1=y(0.0), y2=y(0.0), class_="zero")
    for number, series in enumerate(panel.series):
        shift = DODGE * (number - (len(panel.series) - 1) / 2)
        yield group(list(_series(series, across, y, shift)), class_=f"series colour-{series.colour}")


def _plain_grid(y: Scale, left: float, right: float) -> Markup:
    return group([tag("line", x1=left, x2=right, y1=y(tick), y2=y(tick), class_="grid") for tick in y.ticks()])


def _fitting(x: XAxis, across: Scale) -> list[float]:
    """The ticks whose words do not run into the one before."""
    kept: list[float] = []
    end = -math.inf
    for tick in x.ticks:
        half = text_width(x.name(tick), 12) / 2
        if across(tick) - half > end:
            kept.append(tick)
            end = across(tick) + half + 4
    return kept


def _series(series: Series, across: Scale, y: Scale, shift: float) -> Iterator[Markup]:
    def at(value: float) -> float:
        return y(float(np.clip(value, y.low, y.high)))

    if series.line:
        upper = [(across(x), at(high)) for x, _, _, high in series.line if math.isfinite(high)]
        lower = [(across(x), at(low)) for x, _, low, _ in series.line if math.isfinite(low)]
        if upper:
            yield tag("path", d=path(upper + lower[::-1], closed=True), class_="band")
        yield tag("path", d=path([(across(x), at(mean)) for x, mean, _, _ in series.line]), class_="line")
    if series.joins_marks:
        yield tag("path", d=path([(across(m.x) + shift, at(m.mean)) for m in series.marks]), class_="line")
    for mark in series.marks:
        yield from _mark(mark, across(mark.x) + shift, y)


def _mark(mark: Mark, x: float, y: Scale) -> Iterator[Markup]:
    ends = [value for value in (mark.low, mark.high) if math.isfinite(value)]
    if len(ends) == 2 and mark.low <= y.high and mark.high >= y.low:
        bars = [tag("line", x1=x, x2=x, y1=y(max(mark.low, y.low)), y2=y(min(mark.high, y.high)))]
        bars += [tag("line", x1=x - 3, x2=x + 3, y1=y(end), y2=y(end)) for end in ends if y.holds(end)]
        yield group(bars, class_="error")
    if y.holds(mark.mean):
        yield tag("circle", cx=x, cy=y(mark.mean), r=4.0, class_="marker open" if mark.is_open else "marker")


def _legend(shown: Sequence[Panel], width: float) -> tuple[list[Markup], float]:
    """A sample and a name for each series, as many to a line as fit; and the height of all that."""
    names = {series.label: series.colour for panel in shown for series in panel.series}
    parts, x, y = [], 0.0, 36.0
    for label, colour in names.items():
        needed = 24 + text_width(label) + 18
        if x and x + needed > width:
            x, y = 0.0, y + LEGEND_LINE
        parts.append(tag("circle", cx=x + 8, cy=y - 4, r=5.0, class_=f"marker colour-{colour}"))
        parts.append(tag("text", label, x=x + 20, y=y, class_="label"))
        x += needed
    return parts, y - 36.0 + LEGEND_LINE
