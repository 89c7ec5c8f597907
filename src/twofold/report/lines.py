"""Curves over tokens: one line and one band per variant, colours and dashes by the order of the plan.

The horizontal axis is drawn straight; ``page.js`` turns it logarithmic and back, which needs ``data-low`` and ``data-high`` only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from twofold.report.curves import Curve
from twofold.report.drawing import Scale, coordinate, fences, group, horizontal_grid, linear_ticks, path, svg, tag
from twofold.report.numbers import count
from twofold.report.summary import VariantSummary

TOP, BOTTOM, LEFT, RIGHT = 34.0, 56.0, 58.0, 12.0
COLOURS = 9
LOG_RATIO = 4.0


def style(variant: VariantSummary) -> str:
    """The classes of a variant's line: one of nine colours; controls are dashed, and so is what comes after the ninth, otherwise."""
    dash = ("control" if variant.kind == "control" else "tie") + ("-again" if variant.index >= COLOURS else "")
    return f"line colour-{variant.index % COLOURS} {dash}"


def lines(
    curves: Sequence[Curve],
    variants: Mapping[str, VariantSummary],
    title: str,
    width: float = 880,
    *,
    name: str,
    has_zero: bool = False,
) -> Markup:
    """The figure as SVG. ``has_zero`` draws a zero line and keeps the vertical axis straight; ``name`` makes its ids."""
    height = 400.0 if width > 600 else 300.0
    y = _value_scale(curves, height, has_zero=has_zero)
    first, last = min(c.tokens[0] for c in curves), max(c.tokens[-1] for c in curves)
    x = Scale(low=0.0, high=float(last), start=LEFT, end=width - RIGHT)
    clip = f"clip-{name}-{width:.0f}"
    plot = tag("rect", x=LEFT, y=TOP - 6, width=width - RIGHT - LEFT + 4, height=height - BOTTOM - TOP + 8)
    drawn = [_curve(curve, variants[curve.variant], x, y) for curve in curves]
    parts = [
        tag("clipPath", plot, id=clip),
        tag("text", title, x=0.0, y=16.0, class_="axis-title"),
        horizontal_grid(y, LEFT, width - RIGHT),
        _token_axis(x, height, float(first), width),
        tag("line", x1=LEFT, x2=width - RIGHT, y1=y(0.0), y2=y(0.0), class_="zero") if has_zero else Markup(),
        group(drawn, clip_path=f"url(#{clip})", class_="curves"),
        tag("text", "tokens seen", x=LEFT, y=height - 12, class_="axis-title"),
    ]
    names = ", ".join(variants[curve.variant].label for curve in curves)
    figure = svg(parts, width, height, label=f"{title} over tokens seen, for {names}.", class_="lines")
    # What the script needs to bend the axis.
    data = f' data-start="{coordinate(x.start)}" data-end="{coordinate(x.end)}" data-high="{last:.0f}" data-first="{first:.0f}"'
    return Markup(str(figure).replace("<svg", f"<svg{data}", 1))  # noqa: S704 - numbers only


def settled(curves: Sequence[Curve]) -> list[Curve]:
    """What a figure of differences is scaled to: the last three quarters, where the first steps no longer dwarf the rest; no outliers."""
    last = max(curve.tokens[-1] for curve in curves)
    lowest, highest = fences([float(curve.mean[-1]) for curve in curves])
    kept = []
    for curve in curves:
        late = curve.tokens >= last / 4
        if late.any() and lowest <= curve.mean[-1] <= highest:
            tokens, mean, low, high = (values[late] for values in (curve.tokens, curve.mean, curve.low, curve.high))
            kept.append(Curve(variant=curve.variant, tokens=tokens, mean=mean, low=low, high=high, n=curve.n))
    return kept


def _value_scale(curves: Sequence[Curve], height: float, *, has_zero: bool) -> Scale:
    if has_zero:
        curves = settled(curves)
    means = np.concatenate([curve.mean for curve in curves])
    low, high = float(means.min()), float(means.max())
    if has_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    is_log = not has_zero and low > 0 and high / low > LOG_RATIO
    if is_log:
        low, high = math.log(low), math.log(high)
    bands = [getattr(c, end)[np.isfinite(getattr(c, end))] for c in curves for end in ("low", "high")]
    spread = (high - low) or 0.1 * abs(high) or 1.0
    values = np.concatenate(bands)
    if is_log:
        values = np.log(values[values > 0])
    if len(values):
        low, high = max(min(low, values.min()), low - 0.25 * spread), min(max(high, values.max()), high + 0.25 * spread)
    low, high = float(low - 0.03 * spread), float(high + 0.03 * spread)
    if is_log:
        low, high = math.exp(low), math.exp(high)
    return Scale(low=low, high=high, start=height - BOTTOM, end=TOP, is_log=is_log)


def _curve(curve: Curve, variant: VariantSummary, x: Scale, y: Scale) -> Markup:
    points = [(x(t), y(v)) for t, v in zip(curve.tokens, curve.mean, strict=True)]
    drawn = tag("path", d=path(points), class_=style(variant))
    if len(points) == 1:
        drawn += tag("circle", cx=points[0][0], cy=points[0][1], r=3.0, class_=f"colour-{variant.index % COLOURS} dot")
    known = np.isfinite(curve.low)
    band = Markup()
    if known.sum() > 1:
        tokens, low, high = curve.tokens[known], curve.low[known], curve.high[known]
        floor = y.low if y.is_log else -math.inf
        upper = [(x(t), y(max(v, floor))) for t, v in zip(tokens, high, strict=True)]
        lower = [(x(t), y(max(v, floor))) for t, v in zip(tokens, low, strict=True)]
        band = tag(
            "path",
            d=path(upper + lower[::-1], closed=True),
            class_=f"band colour-{variant.index % COLOURS}" + " of-two" * (curve.n < 3),
        )
    return tag("g", band + drawn, class_="series", data_variant=variant.name)


def _token_axis(x: Scale, height: float, first: float, width: float) -> Markup:
    """Both axes: the straight one, and the logarithmic one that the script may show."""
    y = height - BOTTOM
    straight = [_tick(x(tick), y, count(tick)) for tick in linear_ticks(0, x.high, max(2, int(width / 140)))]
    bent = Scale(low=min(first, x.high / 2), high=x.high, start=x.start, end=x.end, is_log=True)
    ticks = bent.ticks(max(2, int(width / 140)))
    logarithmic = [_tick(bent(tick), y, count(tick)) for tick in ticks if bent.holds(tick)]
    return group([group(straight, class_="axis-straight"), group(logarithmic, class_="axis-log")])


def _tick(x: float, y: float, text: str) -> Markup:
    return tag("line", x1=x, x2=x, y1=y, y2=y + 5, class_="grid") + tag(
        "text", text, x=x, y=y + 19, class_="tick", text_anchor="middle"
    )
