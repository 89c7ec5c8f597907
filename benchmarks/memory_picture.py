"""Memory against cached tokens, as a figure: a line for what the formula counts, and a point for each measurement."""

from __future__ import annotations

import re
from dataclasses import dataclass

from markupsafe import Markup

from rows import Row
from twofold.report.drawing import Scale, bottom_axis, group, horizontal_grid, path, svg, tag, text_width
from twofold.report.files import card
from twofold.report.markers import LABEL_SIZE, LINE_HEIGHT
from twofold.report.numbers import byte_count

WIDTH, HEIGHT = 880.0, 440.0
TOP, BOTTOM, LEFT = 44.0, 62.0, 40.0
POINT = re.compile(r"(?P<tokens>[\d,]+) tokens, (?P<name>\(.*)")
COUNTED = re.compile(r"growth per token, counted, (?P<name>\(.*)")
TICKS = 4
DASHES = {"8 bits": "7 4", "4 bits": "2 4"}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One kind of cache: bytes per token as counted, and (tokens, bytes) as measured."""

    name: str
    bytes_per_token: float
    points: tuple[tuple[int, float], ...]

    @property
    def colour(self) -> str:
        """The class that gives it: blue where one tensor is cached."""
        return "tie" if "K=V" in self.name else "control"

    @property
    def dash(self) -> str | None:
        """How its line is broken: the fewer bits, the less of it is left."""
        return next((dash for words, dash in DASHES.items() if words in self.name), None)

    @property
    def label(self) -> str:
        """At the end of its line."""
        return f"{self.name}: {byte_count(self.bytes_per_token)}" + " per token" * self.is_whole

    @property
    def is_whole(self) -> bool:
        """Whether it is held as computed: these are what the figure is about."""
        return self.dash is None


def series(rows: list[Row]) -> list[Series]:
    """What is drawn, of the rows of ``memory.py``; with half the KV heads a line would lie on another."""
    counted = {found["name"]: row["value"] * 1024 for row in rows if (found := COUNTED.fullmatch(row["name"]))}
    points: dict[str, list[tuple[int, float]]] = {name: [] for name in counted}
    for row in rows:
        if found := POINT.fullmatch(row["name"]):
            points[found["name"]].append((int(found["tokens"].replace(",", "")), row["value"] * 2**20))
    drawn = {name: slope for name, slope in counted.items() if "half" not in name}
    return [Series(name=name, bytes_per_token=slope, points=tuple(points[name])) for name, slope in drawn.items()]


def picture(rows: list[Row], model: str) -> str:
    """The figure as an SVG file, light or dark as its reader prefers; ``model`` says in a few words of what."""
    drawn = sorted(series(rows), key=lambda one: -one.bytes_per_token)
    last = max(tokens for one in drawn for tokens, _ in one.points)
    unit, word = (2**30, "GiB") if drawn[0].bytes_per_token * last >= 2**30 else (2**20, "MiB")
    right = WIDTH - 24 - max(text_width(one.label, LABEL_SIZE) * (1.05 if one.is_whole else 1) for one in drawn)
    x = Scale(low=0.0, high=float(last), start=LEFT, end=right)
    y = Scale(low=0.0, high=1.04 * drawn[0].bytes_per_token * last / unit, start=HEIGHT - BOTTOM, end=TOP)
    ticks = [last * index / TICKS for index in range(TICKS + 1)]
    parts = [
        tag("text", f"Memory of the cache, {word} ({model})", x=0.0, y=16.0, class_="axis-title"),
        horizontal_grid(y, LEFT, right, wanted=6),
        bottom_axis(x, ticks, HEIGHT - BOTTOM, lambda tick: f"{tick:,.0f}"),
        tag("text", "cached tokens of one sequence", x=LEFT, y=HEIGHT - 12, class_="axis-title"),
        *(_series(one, x, y, unit) for one in drawn),
        *_labels(drawn, last, x, y, unit),
        _legend(right),
    ]
    words = "; ".join(f"{one.name}, {byte_count(one.bytes_per_token)} per token" for one in drawn)
    label = f"Memory of the cache against cached tokens, measured on lines that were counted. {words}."
    return card(svg(parts, WIDTH, HEIGHT, label=label, class_="memory"), has_dark=True)


def _series(one: Series, x: Scale, y: Scale, unit: int) -> Markup:
    end = (x(x.high), y(one.bytes_per_token * x.high / unit))
    width = "stroke-width: 2.25" if one.is_whole else None
    line = tag("path", d=path([(x(0), y(0)), end]), class_="line", stroke_dasharray=one.dash, style=width)
    points = [_dot(x(tokens), y(held / unit), one.is_whole) for tokens, held in one.points]
    return group([line, *points], class_=one.colour)


def _dot(x: float, y: float, is_whole: bool = True) -> Markup:
    return tag("circle", cx=x, cy=y, r=4.0 if is_whole else 2.75, class_="dot")


def _labels(drawn: list[Series], last: int, x: Scale, y: Scale, unit: int) -> list[Markup]:
    """One under the other at the ends of their lines, none nearer than a line of text to the one above; from the lowest up, as room is above."""
    at = [y(one.bytes_per_token * last / unit) for one in drawn]
    for index in range(len(at) - 2, -1, -1):
        at[index] = min(at[index], at[index + 1] - LINE_HEIGHT - 1)
    return [
        tag(
            "text",
            one.label,
            x=x(float(last)) + 12,
            y=height + 4.5,
            class_="label",
            style=f"fill: var(--{one.colour})",
            font_weight=600 if one.is_whole else None,
        )
        for one, height in zip(drawn, at, strict=True)
    ]


def _legend(right: float) -> Markup:
    """What a line and a point are."""
    y, parts = HEIGHT - 16.5, []
    for index, words in enumerate(("measured", "counted")):
        start = right - 190 + 110 * index
        line = tag("path", d=path([(start - 24, y), (start - 6, y)]), class_="line")
        parts.append(_dot(start - 15, y) if words == "measured" else line)
        parts.append(tag("text", words, x=start, y=y + 4.5, class_="tick"))
    return group(parts, style="--own: var(--quiet)")
