"""Paired differences with their intervals around a zero line, one row each, in the groups in which they may be read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from twofold.report import markers
from twofold.report.drawing import Scale, bottom_axis, fences, group, span, svg, tag, text_width, tick_labels
from twofold.report.numbers import common_decimals, metric_name, with_interval
from twofold.report.summary import Section, VariantSummary
from twofold.study.statistics import PairedDifference

ROW, HEADING, TOP, BOTTOM = 26.0, 34.0, 8.0, 62.0
LINE = 18.0
EQUAL = {"cache": "Equal cache", "parameters": "Equal parameters", "flops": "Equal operations of training"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One difference: ``variant`` minus what its group's heading names."""

    variant: VariantSummary
    difference: PairedDifference


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Differences to one and the same variant."""

    heading: str
    rows: tuple[Row, ...]


def differences(section: Section) -> tuple[Rows, ...]:
    """All differences that have a value: to the reference, sorted; then within equal cache, parameters or operations, as the plan matches them."""
    to_reference = [
        Row(variant=v, difference=v.difference) for v in section.variants if not v.is_reference and v.difference.n
    ]
    groups = {f"Against {section.reference.label}, the reference": to_reference}
    for match in section.comparisons:
        if match.difference.n:
            row = Row(variant=match.variant, difference=match.difference)
            groups.setdefault(f"{EQUAL[match.quantity]}: against {match.other.label}", []).append(row)
    return tuple(
        Rows(heading=heading, rows=tuple(sorted(rows, key=lambda row: row.difference.mean)))
        for heading, rows in groups.items()
        if rows
    )


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A row as it is drawn. On a narrow figure the texts stand above the bar, on two lines where one is too short for both."""

    row: Row
    value: str
    text_lines: int

    @property
    def height(self) -> float:
        return ROW + LINE * self.text_lines


def forest(section: Section, width: float = 880) -> Markup:
    """The figure as SVG; narrow ones put each name and value above its bar."""
    is_narrow = width < 600
    groups = [(rows.heading, _lines(rows, width)) for rows in differences(section)]
    height = TOP + BOTTOM + sum(HEADING + sum(line.height for line in lines) for _, lines in groups)
    start, end = (14.0, width - 14) if is_narrow else (0.3 * width, 0.72 * width)
    x = _scale([line.row.difference for _, lines in groups for line in lines], start, end)
    ticks = x.ticks(3 if is_narrow else 5)
    names = dict(zip(ticks, tick_labels(ticks), strict=True))
    words = f"← better · difference in {metric_name(section.loss_metric)} · worse →"
    parts = [
        bottom_axis(x, ticks, height - BOTTOM, names.__getitem__, top=TOP),
        tag("line", x1=x(0), x2=x(0), y1=TOP, y2=height - BOTTOM + 5, class_="zero"),
        tag("text", words, x=(start + end) / 2, y=height - 14, class_="axis-title", text_anchor="middle"),
    ]
    y = TOP
    for heading, lines in groups:
        parts.append(tag("text", heading, x=0.0, y=y + 20, class_="row-heading"))
        y += HEADING
        for line in lines:
            parts += _row(line, x, y, width)
            y += line.height
    return svg(parts, width, height, label=alternative(section), class_="forest")


def alternative(section: Section) -> str:
    """The figure in words."""
    groups = differences(section)
    rows = [row for rows in groups for row in rows.rows]
    told = sum(row.difference.excludes_zero for row in rows)
    return (
        f"Paired differences in {metric_name(section.loss_metric)} with 95% intervals: {len(rows)} in {len(groups)} groups, "
        f"of which {told} exclude zero. All values are in the table below the figure."
    )


def _lines(rows: Rows, width: float) -> list[_Line]:
    places = common_decimals(row.difference for row in rows.rows)
    lines = []
    for row in rows.rows:
        value = f"{with_interval(row.difference, places, sign=True)}, n = {row.difference.n}"
        needed = text_width(row.variant.label) + text_width(value, 12) + 24
        lines.append(_Line(row=row, value=value, text_lines=0 if width >= 600 else 1 if needed < width else 2))
    return lines


def _scale(shown: Sequence[PairedDifference], start: float, end: float) -> Scale:
    """Zero is on it, and all means but those of outliers."""
    lowest, highest = fences([difference.mean for difference in shown])
    near = [d for d in shown if _start(d) <= highest and _end(d) >= lowest]
    low, high = span([0.0, *(d.mean for d in near)], [(d.low, d.high) for d in near], most=6)
    return Scale(low=low, high=high, start=start, end=end)


def _start(difference: PairedDifference) -> float:
    return difference.low if math.isfinite(difference.low) else difference.mean


def _end(difference: PairedDifference) -> float:
    return difference.high if math.isfinite(difference.high) else difference.mean


def _row(line: _Line, x: Scale, y: float, width: float) -> list[Markup]:
    row = line.row
    middle = y + ROW / 2 + LINE * line.text_lines
    first = y + 16 if line.text_lines else middle + 4.5
    last = first + LINE * (line.text_lines == 2)
    indent = 8.0 if line.text_lines else 14.0
    kind = "reference" if row.variant.is_reference else row.variant.kind
    value = {"x": indent} if line.text_lines == 2 else {"x": float(width), "text_anchor": "end"}
    return [
        tag("text", row.variant.label, x=indent, y=first, class_="label"),
        tag("text", line.value, y=last, class_="tick value", **value),
        group(_bar(row.difference, x, middle, kind), class_=f"difference {kind}"),
    ]


def _bar(difference: PairedDifference, x: Scale, y: float, kind: str) -> list[Markup]:
    """The interval and its mean; beyond the axis, an arrow."""
    if not x.holds(difference.mean):
        at, arrow = (x.end, "→") if difference.mean > x.high else (x.start, "←")
        return [tag("text", arrow, x=at, y=y + 5, class_="beyond", text_anchor="middle")]
    told = "told" if difference.excludes_zero else "not-told"
    return [_interval(difference, x, y), markers.marker(kind, x(difference.mean), y, size=5, class_=told)]


def _interval(difference: PairedDifference, x: Scale, y: float) -> Markup:
    if not math.isfinite(difference.low):
        return Markup()
    ends = [x(min(max(value, x.low), x.high)) for value in (difference.low, difference.high)]
    parts = [tag("line", x1=ends[0], x2=ends[1], y1=y, y2=y)]
    for value, end in zip((difference.low, difference.high), ends, strict=True):
        if x.holds(value):
            parts.append(tag("line", x1=end, x2=end, y1=y - 4, y2=y + 4))
    return group(parts, class_="error")
