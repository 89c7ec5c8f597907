"""The central figure: loss against cached bytes per token, every variant on it, and the Pareto front with its uncertainty."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from twofold.report import markers
from twofold.report.drawing import (
    Scale,
    binary_ticks,
    bottom_axis,
    coordinate,
    fences,
    group,
    horizontal_grid,
    span,
    svg,
    tag,
    text_width,
)
from twofold.report.numbers import byte_count, metric_name, share, with_interval
from twofold.report.summary import Section, VariantSummary

TOP, BOTTOM, LEFT = 40, 62, 58
MAX_DODGE = 15.0
LOG_LOSS_RATIO = 8.0
CAP = 4
MAX_KEYED = 0.4


@dataclass(frozen=True, kw_only=True)
class _Point:
    variant: VariantSummary
    x: float
    column: float
    y: float
    is_beyond: bool


def frontier(section: Section, width: float = 880, height: float = 460, *, static: bool = False) -> Markup:
    """The figure as SVG. ``static`` leaves out what only a page can use."""
    beyond = outliers(section)
    variants = section.drawn
    y = _loss_scale([variant for variant in variants if variant.name not in beyond], TOP, height - BOTTOM)
    x = _cost_scale(section, width)
    points = _points(variants, x, y)
    placed, keyed = _placed(points, width, height, y)
    key = [points[index] for index in keyed]
    right = width - 8
    axis = f"{metric_name(section.loss_metric)}, held out (lower is better)"
    parts = [
        tag(
            "text",
            f"{section.title}: {axis}" if static else axis,
            x=0.0,
            y=16.0,
            class_="axis-title",
        ),
        horizontal_grid(y, LEFT, right, wanted=5),
        bottom_axis(x, _cost_ticks(x, width), height - BOTTOM, _cost_label(section)),
        tag("text", _cost_title(section, width), x=float(LEFT), y=height - 16.0, class_="axis-title"),
        _front_line(points, y, right),
        group([_error_bar(point, y) for point in points]),
        group([_drawn(point, section, static=static) for point in points]),
        *markers.labels(placed),
        *_key(key, width, height),
        *(_legend(section, width, height) if static else ()),
    ]
    return svg(parts, width, height + _key_height(key, width), label=alternative(section), class_="frontier")


def outliers(section: Section) -> set[str]:
    """Variants whose loss lies so far above the others that they are drawn at the upper edge. Never one on the front."""
    _, high = fences([variant.loss.mean for variant in section.drawn])
    lowest = {v.name: v.loss.low if math.isfinite(v.loss.low) else v.loss.mean for v in section.drawn}
    return {variant.name for variant in section.drawn if lowest[variant.name] > high and not variant.on_front}


def alternative(section: Section) -> str:
    """The figure in words."""
    costs = [variant.cost for variant in section.drawn]
    front = ", ".join(variant.label for variant in section.front)
    label = _cost_label(section)
    return (
        f"{metric_name(section.loss_metric)} against the cache of {len(costs)} variants, from {label(min(costs))} to "
        f"{label(max(costs))} per token. On the Pareto front, cheapest first: {front}. All values are in the table below the figure."
    )


# Scales


def _loss_scale(variants: Sequence[VariantSummary], top: float, bottom: float) -> Scale:
    """Logarithmic where the worst is many times the best."""
    means = [variant.loss.mean for variant in variants]
    intervals = [(variant.loss.low, variant.loss.high) for variant in variants]
    if min(means) <= 0 or max(means) / min(means) <= LOG_LOSS_RATIO:
        low, high = span(means, intervals, most=1.5)
        return Scale(low=low, high=high, start=bottom, end=top)
    positive = [(math.log(start), math.log(end)) for start, end in intervals if start > 0]
    low, high = span([math.log(mean) for mean in means], positive, most=1.5)
    return Scale(low=math.exp(low), high=math.exp(high), start=bottom, end=top, is_log=True)


def _cost_scale(section: Section, width: float) -> Scale:
    costs = [variant.cost for variant in section.drawn]
    low, high = min(costs), max(costs)
    if high / low < 2:
        low, high = low / math.sqrt(2), high * math.sqrt(2)
    longest = max(
        (text_width(v.label, markers.LABEL_SIZE) for v in section.drawn if v.cost >= 0.99 * max(costs)), default=0
    )
    room = min(longest + 30, 0.24 * width)
    return Scale(low=low, high=high, start=LEFT + 36, end=width - 8 - room, is_log=True)


def _cost_ticks(x: Scale, width: float) -> list[float]:
    ticks = binary_ticks(x.low, x.high)
    return ticks[:: max(1, math.ceil(len(ticks) * 60 / width))]


def _cost_label(section: Section) -> Callable[[float], str]:
    return (lambda value: f"{value:.3g} ×") if section.is_grid else byte_count


def _cost_title(section: Section, width: float) -> str:
    if section.is_grid:
        return f"cache per token, as a share of {section.reference.label}’s" + " (log scale)" * (width > 600)
    if width < 600:
        return "cached bytes per token (bf16, log scale)"
    return "cached bytes per token in bfloat16, all layers (log scale)"


# Points


def _points(variants: Sequence[VariantSummary], x: Scale, y: Scale) -> list[_Point]:
    """Variants of equal cost stand side by side, the best in the middle."""
    columns: dict[float, list[VariantSummary]] = {}
    for variant in sorted(variants, key=lambda v: (v.cost, v.loss.mean)):
        columns.setdefault(round(math.log2(variant.cost), 3), []).append(variant)
    centres = sorted(x(members[0].cost) for members in columns.values())
    gaps = [b - a for a, b in itertools.pairwise(centres)] or [x.end - x.start]
    points = []
    for members in columns.values():
        step = min(MAX_DODGE, 0.6 * min(gaps) / len(members))
        for index, variant in enumerate(members):
            offset = step * ((index + 1) // 2) * (-1 if index % 2 else 1)
            centre = x(variant.cost)
            is_beyond = variant.loss.mean > y.high
            at = y.end + 8 if is_beyond else y(variant.loss.mean)
            points.append(_Point(variant=variant, x=centre + offset, column=centre, y=at, is_beyond=is_beyond))
    return points


def _kind(variant: VariantSummary) -> str:
    return "reference" if variant.is_reference else variant.kind


def _drawn(point: _Point, section: Section, *, static: bool) -> Markup:
    shape = markers.marker(_kind(point.variant), point.x, point.y, class_="on-front" if point.variant.on_front else "")
    if static:
        return shape
    hit = tag("circle", cx=point.x, cy=point.y, r=13.0, class_="hit")
    return tag(
        "g", hit + shape, class_="point", tabindex="0", role="img", aria_label=" · ".join(_words(point.variant, section)),
        data_tip="\n".join(_words(point.variant, section)),
    )  # fmt: skip


def _words(variant: VariantSummary, section: Section) -> list[str]:
    cost = _cost_label(section)(variant.cost) + (
        " of the reference’s cache" if section.is_grid else " cached per token"
    )
    lines = [
        variant.label,
        f"{metric_name(section.loss_metric)} {with_interval(variant.loss)}, n = {variant.loss.n}",
        cost,
    ]
    if math.isfinite(variant.front_frequency):
        lines.append(f"on the front in {share(variant.front_frequency)} of resamples")
    return lines


def _error_bar(point: _Point, y: Scale) -> Markup:
    """The interval; an end that leaves the figure has no cap."""
    loss = point.variant.loss
    if not math.isfinite(loss.low) or point.is_beyond:
        return Markup()
    ends = [y(min(max(value, y.low), y.high)) for value in (loss.low, loss.high)]
    parts = [tag("line", x1=point.x, x2=point.x, y1=ends[0], y2=ends[1])]
    for value, end in zip((loss.low, loss.high), ends, strict=True):
        if y.holds(value):
            parts.append(tag("line", x1=point.x - CAP, x2=point.x + CAP, y1=end, y2=end))
    return group(parts, class_=f"error {_kind(point.variant)}")


def _front_line(points: Sequence[_Point], y: Scale, right: float) -> Markup:
    front = sorted((point for point in points if point.variant.on_front), key=lambda point: point.column)
    if not front:
        return Markup()
    corners = [(front[0].column, y.end)]
    for point in front:
        corners += [(point.column, corners[-1][1]), (point.column, point.y)]
    corners.append((right, front[-1].y))
    return tag("path", d="M" + " ".join(f"{coordinate(a)},{coordinate(b)}" for a, b in corners), class_="front-line")


# Labels


def _placed(
    points: Sequence[_Point], width: float, height: float, y: Scale
) -> tuple[list[markers.Placed], Sequence[int]]:
    """The labels; and the points that have a number for a label, because their own found no room. If these are many, all have one."""
    texts = [_label(point) for point in points]
    placed = _labels(points, texts, width, height, y)
    keyed = [index for index in range(len(points)) if index not in placed]
    if len(keyed) > MAX_KEYED * len(points):
        keyed = list(range(len(points)))
    for number, index in enumerate(keyed, start=1):
        texts[index] = f"{number}{' ↑' * points[index].is_beyond}"
    if keyed:
        placed = _labels(points, texts, width, height, y)
    return list(placed.values()), keyed


def _label(point: _Point) -> str:
    variant = point.variant
    return f"{variant.label} ↑ {with_interval(variant.loss).partition(' ')[0]}" if point.is_beyond else variant.label


def _labels(
    points: Sequence[_Point], texts: Sequence[str], width: float, height: float, y: Scale
) -> dict[int, markers.Placed]:
    obstacles = [markers.Box(left=p.x - 7, top=p.y - 7, right=p.x + 7, bottom=p.y + 7) for p in points]
    avoided = _steps(points)
    for point in points:
        loss = point.variant.loss
        if math.isfinite(loss.low) and not point.is_beyond:
            low, high = (y(min(max(value, y.low), y.high)) for value in (loss.low, loss.high))
            avoided.append(markers.Box(left=point.x - 4, top=high, right=point.x + 4, bottom=low))
    anchors = [markers.Anchor(x=point.x, y=point.y, text=text) for point, text in zip(points, texts, strict=True)]
    room = markers.Box(left=LEFT - 6, top=TOP - 14, right=width, bottom=height - BOTTOM + 2)
    return markers.place(anchors, obstacles, avoided, room)


def _steps(points: Sequence[_Point]) -> list[markers.Box]:
    """The front's line, to keep labels off it where there is room elsewhere."""
    front = sorted((point for point in points if point.variant.on_front), key=lambda point: point.column)
    boxes = []
    for here, after in itertools.pairwise(front):
        boxes.append(markers.Box(left=here.column, right=after.column, top=here.y - 2, bottom=here.y + 2))
        boxes.append(markers.Box(left=after.column - 2, right=after.column + 2, top=here.y, bottom=after.y))
    if front:
        boxes.append(markers.Box(left=front[-1].column, right=1e6, top=front[-1].y - 2, bottom=front[-1].y + 2))
        boxes.append(markers.Box(left=front[0].column - 2, right=front[0].column + 2, top=0, bottom=front[0].y))
    return boxes


def _legend(section: Section, width: float, height: float) -> list[Markup]:
    """What the marks and bars mean, for a picture that stands alone."""
    shown = (("reference", 350.0, "reference"), ("tie", 258.0, "tie"), ("control", 208.0, "control"))
    parts = [markers.marker(kind, width - left, 11.5, size=4.5) for kind, left, _ in shown]
    parts += [tag("text", text, x=width - left + 10, y=16.0, class_="axis-title") for _, left, text in shown]
    x = width - 132
    step = f"M{coordinate(x)},6 H{coordinate(x + 14)} V17 H{coordinate(x + 28)}"
    seeds = max(variant.loss.n for variant in section.drawn)
    words = f"means and 95% intervals over {seeds} seeds" if seeds > 1 else "one seed: no intervals"
    return [
        *parts,
        tag("path", d=step, class_="front-line"),
        tag("text", "Pareto front", x=x + 36, y=16.0, class_="axis-title"),
        tag("text", words, x=width - 8, y=height - 16.0, class_="axis-title", text_anchor="end"),
    ]


def _key(points: Sequence[_Point], width: float, height: float) -> list[Markup]:
    """What the numbers stand for, under the plot."""
    columns = _key_columns(points, width)
    parts = []
    for place, point in enumerate(points):
        x = 4 + (place % columns) * width / columns
        y = height + 12.0 + (place // columns) * 20
        parts.append(tag("text", f"{place + 1}", x=x + 12, y=y, class_="tick", text_anchor="end"))
        parts.append(markers.marker(_kind(point.variant), x + 25, y - 4.5, size=4.5))
        parts.append(tag("text", point.variant.label, x=x + 36, y=y, class_="label"))
    return parts


def _key_columns(points: Sequence[_Point], width: float) -> int:
    """As many as have room for the longest label."""
    longest = max((text_width(point.variant.label, markers.LABEL_SIZE) for point in points), default=0.0)
    return max(1, int(width // max(260, 44 + longest)))


def _key_height(points: Sequence[_Point], width: float) -> float:
    return 20.0 * math.ceil(len(points) / _key_columns(points, width)) + 6 if points else 0.0
