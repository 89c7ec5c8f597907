"""Two pictures that need no script: all measures beside what is random, and one head's cloud from one side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from twofold.geometry.paper import FIGURES
from twofold.geometry.points import ALL, HeadPoints, View
from twofold.geometry.summary import Row
from twofold.report.drawing import Scale, bottom_axis, group, path, svg, tag, tick_labels

ROW, TOP, BOTTOM = 34.0, 8.0, 44.0
YAW, PITCH, DISTANCE = 0.6, 0.35, 3.2
FILLED = 0.55
MIN_LOOK, LABELLED = 0.015, 4


# Measures


def strips(rows: Sequence[Row], width: float) -> Markup:
    """A row for each measure: every head as a dot, the random range as a bar, the untrained model as a cross, the paper's figure as a diamond."""
    is_narrow = width < 600
    row_height = ROW + 16 * is_narrow
    height = TOP + BOTTOM + row_height * len(rows)
    x = Scale(low=_low(rows), high=1.0, start=10.0 if is_narrow else 0.32 * width, end=width - 14)
    ticks = x.ticks(4 if is_narrow else 6)
    names = dict(zip(ticks, tick_labels(ticks), strict=True))
    parts: list[Markup] = [bottom_axis(x, ticks, height - BOTTOM, names.__getitem__, top=TOP)]
    for index, row in enumerate(rows):
        y = TOP + row_height * index + row_height / 2 + 8 * is_narrow
        name = {"x": 10.0, "y": y - 17} if is_narrow else {"x": 0.0, "y": y + 4.5}
        parts.append(tag("text", row.measure.name, class_="label", **name))
        parts.append(group(_strip(row, x, y)))
    return svg(parts, width, height, label=alternative(rows), class_="strips")


def alternative(rows: Sequence[Row]) -> str:
    """The figure in words."""
    outside = sum(row.outside for row in rows)
    return (
        f"{len(rows)} measures with every head's value beside the range of random matrices: {outside} of "
        f"{sum(len(row.all_values) for row in rows)} values lie outside it. All numbers are in the table below the figure."
    )


def _low(rows: Sequence[Row]) -> float:
    lowest = min(0.0, *(value for row in rows for value in (*row.all_values, row.pooled.low) if math.isfinite(value)))
    return math.floor(lowest * 4 - 1e-9) / 4 if lowest < -0.02 else -0.02


def _strip(row: Row, x: Scale, y: float) -> list[Markup]:
    random, parts = row.pooled, []
    if random.draws:
        left, right = x(max(random.low, x.low)), x(random.high)
        parts.append(tag("rect", x=left - 1, y=y - 9, width=right - left + 2, height=18, rx=3, class_="range"))
        parts.append(tag("line", x1=x(random.mean), x2=x(random.mean), y1=y - 9, y2=y + 9, class_="middle"))
    values = row.all_values
    for index, value in enumerate(values):
        # Heads with nearly one value would cover each other: they are spread over the height of the bar, in their order.
        offset = 0.0 if len(values) < 2 else 12 * (index / (len(values) - 1) - 0.5)
        parts.append(tag("circle", cx=x(value), cy=y + offset, r=2.6, class_="head"))
    if math.isfinite(row.untrained):
        at = x(row.untrained)
        parts.append(tag("path", d=f"M{at - 4:.2f},{y - 4:.2f}l8,8m0,-8l-8,8", class_="untrained"))
    for figure in FIGURES:
        if figure.key == row.measure.key:
            at = x(figure.value)
            parts.append(
                tag(
                    "path",
                    d=path([(at, y - 6), (at + 6, y), (at, y + 6), (at - 6, y)], closed=True),
                    class_="published",
                )
            )
    return parts


# A cloud


def cloud(points: HeadPoints, pieces: Sequence[str], token: int, width: float = 880, height: float = 560) -> Markup:
    """One head from one side: clouds, the hull in which the output of ``token``'s query lies, what it looks at, and its pull."""
    view, size = points.views[ALL], FILLED * min(width, height)
    middle, scale = view.frame()

    def at(place: NDArray[np.float64]) -> tuple[float, float]:
        x, y, z = _turned((place - middle.numpy()) / scale)
        near = DISTANCE / (DISTANCE + z)
        return width / 2 + size * near * x, height / 2 - size * near * y

    flat = {name: [at(place) for place in cloud.numpy()] for name, cloud in view.clouds.items()}
    keys = next(flat[name] for name in flat if "K" in name)
    values = next(flat[name] for name in flat if "V" in name)
    weights = points.weights[0, token].tolist()
    states = [at(place) for place in view.states[token].numpy()]
    parts = [*_hull(view, values, token), *_dots(flat, weights, token)]
    for key, weight in enumerate(weights):
        if weight >= MIN_LOOK:
            (x1, y1), (x2, y2) = states[0], keys[key]
            width_ = 0.5 + 5 * weight
            parts.append(
                tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_="look", stroke_width=width_, opacity=0.2 + 0.6 * weight)
            )
    parts.append(tag("path", d=path(states), class_="path"))
    parts += [tag("circle", cx=x, cy=y, r=3.0, class_="state") for x, y in states[2:]]
    x, y = states[1]
    diamond = path([(x, y - 7), (x + 7, y), (x, y + 7), (x - 7, y)], closed=True)
    parts += [tag("path", d=diamond, class_="state"), tag("path", d=_triangle(*states[0], 7), class_="queries")]
    labels = [(states[0], f"query {shown_piece(pieces[token])}"), (states[1], "output")]
    top = sorted(range(len(weights)), key=lambda key: -weights[key])[:LABELLED]
    labels += [(keys[key], shown_piece(pieces[key])) for key in top if weights[key] >= 0.06]
    parts += [tag("text", words, x=x + 8, y=y - 7, class_="label") for (x, y), words in labels]
    return svg(parts, width, height, label=f"The cloud of one head, and the query of token {token}.", class_="cloud3")


def shown_piece(piece: str) -> str:
    """A token in a line: white space gets a sign."""
    return {" ": "␣", "": "∅"}.get(piece, piece.replace("\n", "⏎").replace("\t", "⇥"))


def _turned(place: NDArray[np.float64]) -> tuple[float, float, float]:
    x, y, z = (float(value) for value in place)
    a, c = math.cos(YAW) * x + math.sin(YAW) * z, math.cos(YAW) * z - math.sin(YAW) * x
    return a, math.cos(PITCH) * y - math.sin(PITCH) * c, math.cos(PITCH) * c + math.sin(PITCH) * y


def _hull(view: View, values: Sequence[tuple[float, float]], token: int) -> list[Markup]:
    index = view.hull_of[token]
    faces = view.hulls[index] if index >= 0 else ()
    edges = sorted({(face[m], face[n]) for face in faces for m, n in ((0, 1), (1, 2), (0, 2))})
    shapes = [tag("path", d=path([values[corner] for corner in face], closed=True), class_="face") for face in faces]
    lines = [
        tag("line", x1=values[m][0], y1=values[m][1], x2=values[n][0], y2=values[n][1], class_="edge") for m, n in edges
    ]
    return shapes + lines


def _dots(flat: dict[str, list[tuple[float, float]]], weights: Sequence[float], token: int) -> list[Markup]:
    parts = []
    for name, places in flat.items():
        is_key = "K" in name or "V" in name
        for index, (x, y) in enumerate(places):
            radius = 2.6 + (8 * math.sqrt(weights[index]) if is_key else 0)
            faint = "" if index <= token else " faint"
            if "K" in name:
                parts.append(tag("circle", cx=x, cy=y, r=radius, class_=f"keys{faint}"))
            elif "V" in name:
                side = 1.8 * radius
                parts.append(
                    tag("rect", x=x - side / 2, y=y - side / 2, width=side, height=side, class_=f"values{faint}")
                )
            else:
                parts.append(tag("path", d=_triangle(x, y, radius), class_=f"queries{faint}"))
    return parts


def _triangle(x: float, y: float, r: float) -> str:
    return path([(x, y - 1.25 * r), (x + 1.15 * r, y + 0.8 * r), (x - 1.15 * r, y + 0.8 * r)], closed=True)
