"""Paired differences with their intervals around a zero line, one row each, in the groups in which they may be read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from twofold.report import markers
from twofold.report.drawing import Scale, bottom_axis, group, svg, tag, tick_labels
from twofold.report.numbers import metric_name, with_interval
from twofold.report.summary import Section, VariantSummary
from twofold.study.statistics import PairedDifference

ROW, HEADING, TOP, BOTTOM = 26.0, 34.0, 8.0, 62.0


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
    """All differences that have a value: to the reference, sorted; then within equal cache and equal parameters, as the plan matches them."""
    to_reference = [Row(variant=v, difference=v.difference) for v in section.variants if not v.is_reference and v.difference.n]
    groups = {f"Against {section.reference.label}, the reference": to_reference}
    for match in section.comparisons:
        if match.difference.n:
            words = "Equal cache" if match.quantity == "cache" else "Equal parameters"
            row = Row(variant=match.variant, difference=match.difference)
            groups.setdefault(f"{words}: against {match.other.label}", []).append(row)
    return tuple(
        Rows(heading=heading, rows=tuple(sorted(rows, key=lambda row: row.difference.mean)))
        for heading, rows in groups.items()
        if rows
    )


def forest(section: Section, width: float = 880) -> Markup:
    """The figure as SVG; narrow ones put each name above its line."""
    groups = differences(section)
    is_narrow = width < 600
    row_height = ROW + (18 if is_narrow else 0)
    name_width = 0.0 if is_narrow else 0.3 * width
    value_width = 0.0 if is_narrow else 0.25 * width
    height = TOP + BOTTOM + sum(HEADING + row_height * len(rows.rows) for rows in groups)
    x = _scale([row.difference for rows in groups for row in rows.rows], name_width + 14, width - value_width - 14)
    ticks = x.ticks(3 if is_narrow else 5)
    names = dict(zip(ticks, tick_labels(ticks), strict=True))
    parts = [
        bottom_axis(x, ticks, height - BOTTOM, names.__getitem__, top=TOP),
        tag("line", x1=x(0), x2=x(0), y1=TOP, y2=height - BOTTOM + 5, class_="zero"),
        tag("text", f"← better · difference in {metric_name(section.loss_metric)} · worse →",
            x=(x.start + x.end) / 2, y=height - 14, class_="axis-title", text_anchor="middle"),
    ]
    y = TOP
    for rows in groups:
        parts.append(tag("text", rows.heading, x=0.0, y=y + 20, class_="row-heading"))
        y += HEADING
        for row in rows.rows:
            parts += _row(row, x, y, row_height, width)
            y += row_height
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


def _scale(differences_shown: Sequence[PairedDifference], start: float, end: float) -> Scale:
    """Zero and all means are on it; of intervals as much as twice the range of the means."""
    means = [0.0, *(difference.mean for difference in differences_shown)]
    spread = (max(means) - min(means)) or 1.0
    ends = [value for d in differences_shown for value in (d.low, d.high) if math.isfinite(value)]
    low = max(min([*means, *ends]), min(means) - 0.8 * spread)
    high = min(max([*means, *ends]), max(means) + 0.8 * spread)
    return Scale(low=low - 0.04 * (high - low), high=high + 0.04 * (high - low), start=start, end=end)


def _row(row: Row, x: Scale, y: float, height: float, width: float) -> list[Markup]:
    is_narrow = width < 600
    middle = y + height / 2 + (9 if is_narrow else 0)
    value = f"{with_interval(row.difference, sign=True)}, n = {row.difference.n}"
    baseline = y + 16 if is_narrow else middle + 4.5
    kind = "reference" if row.variant.is_reference else row.variant.kind
    told = "told" if row.difference.excludes_zero else "not-told"
    bar = [_interval(row.difference, x, middle), markers.marker(kind, x(row.difference.mean), middle, size=5, class_=told)]
    return [
        tag("text", row.variant.label, x=8.0 if is_narrow else 14.0, y=baseline, class_="label"),
        tag("text", value, x=width, y=baseline, class_="tick value", text_anchor="end"),
        group(bar, class_=f"difference {kind}"),
    ]


def _interval(difference: PairedDifference, x: Scale, y: float) -> Markup:
    if not math.isfinite(difference.low):
        return Markup()
    ends = [x(min(max(value, x.low), x.high)) for value in (difference.low, difference.high)]
    parts = [tag("line", x1=ends[0], x2=ends[1], y1=y, y2=y)]
    for value, end in zip((difference.low, difference.high), ends, strict=True):
        if x.holds(value):
            parts.append(tag("line", x1=end, x2=end, y1=y - 4, y2=y + 4))
    return group(parts, class_="error")
