"""A small SVG writer, axes, and nothing else: figures are drawn here, so that they are there without scripts, in print and in a README.

Coordinates are pixels of the view box, y downwards. Colours come from classes (see ``figure.css``), never from a figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

TEXT_WIDTH = 0.56  # of the font size, the mean advance of a sans-serif letter


def tag(name: str, *children: str, **attributes: str | float | None) -> Markup:
    """An element. Text is escaped unless it is Markup; ``class_`` and ``stroke_width`` become ``class`` and ``stroke-width``.

    >>> str(tag("text", "a < b", x=1.50001, class_="axis"))
    '<text x="1.5" class="axis">a &lt; b</text>'
    """
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(coordinate(value) if isinstance(value, float) else value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    content = "".join(escape(child) for child in children)
    return Markup(f"<{name}{shown}>{content}</{name}>" if children else f"<{name}{shown}/>")  # noqa: S704 - escaped above


def group(children: Sequence[str], **attributes: str | float | None) -> Markup:
    """A ``g`` of elements."""
    return tag("g", Markup().join(children), **attributes)


def coordinate(value: float) -> str:
    """At most two digits after the point, without the zeros."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value else "0"


def path(points: Sequence[tuple[float, float]], *, closed: bool = False) -> str:
    """The ``d`` of a line through the points."""
    steps = " ".join(f"{coordinate(x)},{coordinate(y)}" for x, y in points)
    return f"M{steps}{'Z' if closed else ''}" if points else ""


def text_width(text: str, size: float = 13) -> float:
    """Roughly, the width of a text in a sans-serif of that size."""
    return len(text) * size * TEXT_WIDTH


@dataclass(frozen=True, kw_only=True)
class Scale:
    """From values to pixels, straight or logarithmic. Calling it gives the pixel."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high, at = (math.log(v) if self.is_log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / ((high - low) or 1.0) * (self.end - self.start)

    def holds(self, value: float) -> bool:
        """Whether the value is on the axis."""
        return self.low <= value <= self.high

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round values on the axis, about as many as wanted."""
        return log_ticks(self.low, self.high, wanted) if self.is_log else linear_ticks(self.low, self.high, wanted)


def linear_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten.

    >>> linear_ticks(0.13, 0.52)
    [0.2, 0.3, 0.4, 0.5]
    """
    if not high > low:
        return [low]
    raw = (high - low) / max(wanted, 1)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= raw * 0.999)
    digits = max(0, -math.floor(math.log10(step))) + 1
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, digits) + 0.0 for index in range(first, last + 1)]


def log_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Powers of ten and, where there are few, their multiples by 2 and 5, or by all digits."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        found = [f * 10.0**e for e in exponents for f in factors if low * 0.9999 <= f * 10.0**e <= high * 1.0001]
        if len(found) >= min(wanted, 3):
            return found[:: max(1, round(len(found) / (wanted + 1)))]
    return linear_ticks(low, high, wanted)


def binary_ticks(low: float, high: float) -> list[float]:
    """Powers of two on the axis."""
    return [2.0**e for e in range(math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9) + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """All with as many digits as the finest one needs."""
    places = next((p for p in range(7) if all(math.isclose(round(t, p), t, rel_tol=1e-9) for t in ticks)), 6)
    same = [f"{tick:,.{places}f}".replace("-", "−") for tick in ticks]
    return same if max(map(len, same), default=0) < 7 else [f"{tick:.3g}".replace("-", "−") for tick in ticks]


def fences(values: Sequence[float]) -> tuple[float, float]:
    """Between these a figure shows values in full: Tukey's outer fences, quartiles ± 3 ranges. Infinite for fewer than 6 values.

    One variant that fails would otherwise press all others into a line.
    """
    low, high = (float(quartile) for quartile in np.quantile(values, (0.25, 0.75))) if len(values) > 5 else (0.0, 0.0)
    if not high > low:
        return -math.inf, math.inf
    return low - 3 * (high - low), high + 3 * (high - low)


def span(means: Sequence[float], intervals: Sequence[tuple[float, float]], *, most: float) -> tuple[float, float]:
    """The ends of an axis: all means are on it, and of their intervals what leaves the means readable.

    Room beyond the means is at least 0.6 of their own range and at most ``most`` times it, in between the median interval: over two
    seeds an interval may be a hundred times as wide as all differences.
    """
    low, high = min(means), max(means)
    spread = (high - low) or 0.1 * abs(high) or 1.0
    finite = [(start, end) for start, end in intervals if math.isfinite(start) and math.isfinite(end)]
    half = float(np.median([(end - start) / 2 for start, end in finite])) if finite else 0.0
    room = max(0.6 * spread, min(1.1 * half, most * spread))
    low = max(min([low, *(start for start, _ in finite)]), low - room)
    high = min(max([high, *(end for _, end in finite)]), high + room)
    margin = 0.05 * ((high - low) or spread)
    return low - margin, high + margin


def horizontal_grid(scale: Scale, left: float, right: float, wanted: int = 5) -> Markup:
    """Lines across the plot with their labels at the left."""
    ticks = scale.ticks(wanted)
    parts = []
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        y = scale(tick)
        parts.append(tag("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", label, x=left - 8, y=y + 4, class_="tick", text_anchor="end"))
    return group(parts)


def bottom_axis(
    scale: Scale, ticks: Sequence[float], y: float, label: Callable[[float], str], *, top: float | None = None
) -> Markup:
    """Ticks and labels under the plot; with ``top``, lines up to there."""
    parts = []
    for tick in ticks:
        x = scale(tick)
        parts.append(tag("line", x1=x, x2=x, y1=y if top is None else top, y2=y + 5, class_="grid"))
        parts.append(tag("text", label(tick), x=x, y=y + 19, class_="tick", text_anchor="middle"))
    return group(parts)


def svg(children: Sequence[str], width: float, height: float, *, label: str, class_: str = "") -> Markup:
    """The whole picture. ``label`` is what a screen reader says for it; the parts that can be reached speak for themselves."""
    return tag(
        "svg", Markup().join(children), xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {coordinate(width)} {coordinate(height)}",
        class_=f"plot {class_}".strip(), role="group", aria_label=label, font_size="13",
    )  # fmt: skip
