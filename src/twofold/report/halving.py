"""What became of a model's cache, layer by layer, as a picture: bytes before and after, and what rounding costs where it costs anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from markupsafe import Markup

from twofold.report.drawing import Scale, group, horizontal_grid, svg, tag
from twofold.report.files import card
from twofold.report.numbers import byte_count

WIDTH, HEIGHT = 880.0, 360.0
TOP, BOTTOM, LEFT, RIGHT = 44.0, 66.0, 56.0, 12.0
LEGEND = (("control", "before"), ("tie", "one tensor"), ("colour-0", "as before"))


class Layer(Protocol):
    """What is known of a layer."""

    @property
    def name(self) -> str:
        """Where it is in its model."""

    @property
    def is_halved(self) -> bool:
        """Whether it holds one tensor now."""

    @property
    def measured_error(self) -> float:
        """What rounding does to the tensor that is not held, relative to its size."""

    def cache_bytes(self, tokens: int, width: int, *, halved: bool) -> int:
        """Bytes of its cache, after or before."""


def halving_picture(layers: Sequence[Layer], *, model: str, tokens: int, width: int) -> str:
    """The figure as an SVG file, light or dark as its reader prefers; ``width`` is the bytes of a cached float."""
    before = [layer.cache_bytes(tokens, width, halved=False) for layer in layers]
    after = [layer.cache_bytes(tokens, width, halved=True) for layer in layers]
    unit, word = next(
        (size, word) for size, word in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")) if max(before) >= size
    )
    y = Scale(low=0.0, high=1.08 * max(before) / unit, start=HEIGHT - BOTTOM, end=TOP)
    slot = (WIDTH - LEFT - RIGHT) / len(layers)
    title = f"Cache of each layer for {tokens:,} tokens, {word} ({model}: {byte_count(sum(before))} before, {byte_count(sum(after))} after)"
    has_errors = any(layer.measured_error for layer in layers)
    axis = "layer; above a bar, the error that rounding in the cache costs" if has_errors else "layer"
    parts = [
        tag("text", title, x=0.0, y=16.0, class_="axis-title"),
        horizontal_grid(y, LEFT, WIDTH - RIGHT),
        *(
            _bars(layer, (b / unit, a / unit), y, LEFT + slot * (index + 0.5), min(slot * 0.4, 26.0))
            for index, (layer, b, a) in enumerate(zip(layers, before, after, strict=True))
        ),
        *_numbers(len(layers), slot),
        tag("text", axis, x=LEFT, y=HEIGHT - 10, class_="axis-title"),
        _legend(),
    ]
    halved = sum(layer.is_halved for layer in layers)
    label = f"{halved} of {len(layers)} layers of {model} hold one tensor: {byte_count(sum(before))} before, {byte_count(sum(after))} after."
    return card(svg(parts, WIDTH, HEIGHT, label=label, class_="halving"), has_dark=True)


def _bars(layer: Layer, heights: tuple[float, float], y: Scale, middle: float, wide: float) -> Markup:
    before, after = heights
    colour = "tie" if layer.is_halved else "colour-0"
    bars = [
        _bar(middle - wide, wide, y, before, "control") if layer.is_halved else Markup(),
        _bar(middle if layer.is_halved else middle - wide / 2, wide, y, after, colour),
    ]
    if layer.measured_error:
        bars.append(
            tag("text", f"{layer.measured_error:.1g}", x=middle, y=y(before) - 6, class_="tick", text_anchor="middle")
        )
    return group(bars)


def _bar(x: float, wide: float, y: Scale, height: float, colour: str) -> Markup:
    return group([tag("rect", x=x, y=y(height), width=wide, height=y(0.0) - y(height), class_="dot")], class_=colour)


def _numbers(count: int, slot: float) -> list[Markup]:
    """The numbers of layers, as many as there is room for."""
    step = max(1, -(-count * 26 // round(count * slot)))
    return [
        tag(
            "text",
            str(index),
            x=LEFT + slot * (index + 0.5),
            y=HEIGHT - BOTTOM + 19,
            class_="tick",
            text_anchor="middle",
        )
        for index in range(0, count, step)
    ]


def _legend() -> Markup:
    y, parts = HEIGHT - 14.0, []
    for index, (colour, words) in enumerate(LEGEND):
        x = WIDTH - RIGHT - 300 + 100 * index
        parts.append(group([tag("rect", x=x, y=y - 9, width=10.0, height=10.0, class_="dot")], class_=colour))
        parts.append(tag("text", words, x=x + 16, y=y, class_="tick"))
    return group(parts)
