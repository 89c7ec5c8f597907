"""The plane as a picture: a disc on which every tie is a mark and every area has the colour of the nearest tie that was measured.

Shapes say on which line a tie lies, so that nothing is said by colour alone. A tie of the rim is drawn at both of its ends. Cells are drawn once, in
thousandths of the disc's radius, and used by every figure of a page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from twofold.plane import Point, Region, on_disc
from twofold.report import markers
from twofold.report.drawing import fences, group, svg, tag, tick_labels
from twofold.report.numbers import metric_name, with_interval
from twofold.report.plane.sheets import Place, Sheet

LEVELS = 9
UNIT = 1000
CELL_WAYS = 24
# Further from every measured tie than this, nothing is coloured.
MAX_CELL = math.radians(20)
TOP, SIDE, FOOT = 44.0, 46.0, 92.0
BAR_HEIGHT = 12.0


@dataclass(frozen=True)
class Colours:
    """From a sheet's values to levels, 0 the best. Values of the few that lie far outside share the last level."""

    best: float
    worst: float

    @classmethod
    def of(cls, sheet: Sheet) -> Colours:
        """Those of a sheet; the reference is on them too, unless it lies far outside."""
        means = [place.value.mean for place in sheet.places]
        lowest, highest = fences(means)
        inside = [mean for mean in (*means, sheet.reference.mean) if lowest <= mean <= highest]
        ends = (min(inside), max(inside)) if inside else (min(means), max(means))
        return cls(*(ends[::-1] if sheet.higher_is_better else ends))

    def share(self, value: float) -> float:
        """0 at the best end, 1 at the worst; beyond them the end itself."""
        return min(max((value - self.best) / ((self.worst - self.best) or 1.0), 0.0), 1.0)

    def level(self, value: float) -> int:
        """The class of colours."""
        return min(int(self.share(value) * LEVELS), LEVELS - 1)


@dataclass(frozen=True)
class Frame:
    """Where the disc stands in a figure."""

    x: float
    y: float
    radius: float

    def at(self, point: Point, *, other_end: bool = False) -> tuple[float, float]:
        """The pixel of a tie; of one on the rim, also the other end's."""
        x, y = on_disc(point.direction)
        sign = -1.0 if other_end else 1.0
        return self.x + sign * self.radius * float(x), self.y - sign * self.radius * float(y)


# Cells


def cells(points: Sequence[Point], key: str) -> Markup:
    """Definitions of each tie's area, by the number of its tie in ``points``: a path with the id ``cell-<key>-<number>``."""
    directions = np.array([point.direction for point in points])
    found = []
    for index, direction in enumerate(directions):
        outlines = []
        for sign in (1.0, -1.0):
            outline = _outline(sign * direction, np.concatenate([directions, -directions]))
            if outline[:, 2].max() > 0:
                outlines.append(_path(on_disc(outline)))
        found.append(tag("path", id=f"cell-{key}-{index}", d="".join(outlines)))
    rim = tag("circle", cx=0.0, cy=0.0, r=float(UNIT))
    return tag("defs", Markup().join(found) + tag("clipPath", rim, id=f"rim-{key}"))


def _outline(own: NDArray[np.float64], all_directions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Unit vectors [n, 3] around the area that is nearer to ``own`` than to any other, as far as MAX_CELL: CELL_WAYS of them, and the corners."""
    others = all_directions[np.abs(all_directions @ own - 1) > 1e-9]
    first = np.cross(own, np.eye(3)[int(np.argmin(np.abs(own)))])
    first /= np.linalg.norm(first)
    turns = np.linspace(0, 2 * math.pi, CELL_WAYS, endpoint=False)[:, None]
    ways = np.cos(turns) * first + np.sin(turns) * np.cross(own, first)
    # Along a way w from p the border to q is met where cos s (1 - p.q) = sin s (w.q).
    toward = ways @ others.T
    reach = np.where(toward > 0, np.arctan2(1 - others @ own, np.maximum(toward, 1e-12)), math.pi)
    far = np.minimum(reach.min(axis=1), MAX_CELL)[:, None]
    edge: NDArray[np.float64] = np.cos(far) * own + np.sin(far) * ways
    nearest = others[reach.argmin(axis=1)]
    found: list[NDArray[np.float64]] = []
    for index, here in enumerate(edge):
        found.append(here)
        corner = np.cross(own - nearest[index], own - nearest[(index + 1) % CELL_WAYS])
        if np.linalg.norm(corner) > 1e-9:
            corner *= math.copysign(1.0, corner @ own) / np.linalg.norm(corner)
            if corner @ own > math.cos(MAX_CELL) and corner @ own >= (others @ corner).max() - 1e-9:
                found.append(corner)
    return np.array(found)


def _path(flat: NDArray[np.float64], *, closed: bool = True) -> str:
    return "M" + " ".join(f"{round(UNIT * x)},{round(-UNIT * y)}" for x, y in flat) + "Z" * closed


# The figure


def figure(sheet: Sheet, width: float, *, key: str) -> Markup:
    """The disc with its marks, which can be reached, and colours; the cells of that key are elsewhere on the page."""
    is_narrow = width < 600
    radius = (width - 2 * (22.0 if is_narrow else SIDE)) / 2
    frame = Frame(x=width / 2, y=TOP + radius, radius=radius)
    height = frame.y + radius + FOOT
    colours = Colours.of(sheet)
    parts = [
        tag("text", _title(sheet), x=0.0, y=16.0, class_="axis-title"),
        disc(sheet, frame, colours, key=key),
        *([] if is_narrow else _labels(sheet, frame, width, height)),
        scale(sheet, colours, left=frame.x - radius, right=frame.x + radius, y=height - 44),
    ]
    return svg(parts, width, height, label=alternative(sheet), class_="plane")


def _title(sheet: Sheet) -> str:
    better = "higher" if sheet.higher_is_better else "lower"
    return f"{metric_name(sheet.metric)}, held out ({better} is better)"


def alternative(sheet: Sheet) -> str:
    """The picture in words."""
    means = [place.value.mean for place in sheet.places]
    return (
        f"The plane of ties, {sheet.section.title}: {metric_name(sheet.metric)} of {len(means)} ties, from {min(means):.4g} to {max(means):.4g}, "
        f"and {len(sheet.cliffs)} cliffs between neighbours. All values are in the tables below the picture."
    )


def disc(sheet: Sheet, frame: Frame, colours: Colours, *, key: str, is_mute: bool = False) -> Markup:
    """Areas, lines, cliffs and marks; mute marks are part of a picture, and cannot be reached."""
    areas = [
        tag("use", href=f"#cell-{key}-{index}", class_=f"cell level-{colours.level(place.value.mean)}")
        for index, place in enumerate(sheet.places)
    ]
    marks = [_mark(place, sheet, frame, colours, is_mute=is_mute) for place in sheet.places]
    return group([_inside(areas, frame, key), _lines(frame), _inside(_cliff_lines(sheet), frame, key), group(marks)])


def _inside(parts: Sequence[Markup], frame: Frame, key: str) -> Markup:
    """Parts in thousandths of the radius, as far as the rim."""
    to_pixels = f"translate({frame.x:.1f} {frame.y:.1f}) scale({frame.radius / UNIT:.4f})"
    return group([group(parts, clip_path=f"url(#rim-{key})")], transform=to_pixels, aria_hidden="true")


def _lines(frame: Frame) -> Markup:
    """The three lines of the plane on which a role is a multiple of another, and the corners, which are no ties."""
    x, y, r = frame.x, frame.y, frame.radius
    size = 4.0 if r > 200 else 2.5
    parts = [
        tag("line", x1=x, x2=x, y1=y - r, y2=y + r, class_="border"),
        tag("line", x1=x - r, x2=x + r, y1=y, y2=y, class_="border"),
        tag("circle", cx=x, cy=y, r=r, class_="border"),
    ]
    corners = [(x, y), (x + r, y), (x - r, y), (x, y - r), (x, y + r)]
    parts += [tag("circle", cx=cx, cy=cy, r=size, class_="corner") for cx, cy in corners]
    parts.append(tag("text", "K = 0", x=x, y=y - r - 10, class_="tick", text_anchor="middle"))
    if r > 200:
        parts.append(tag("text", "Q = 0", x=x + r + 7, y=y + 4, class_="tick"))
        parts.append(tag("text", "V = 0", x=x + 8, y=y - 6, class_="tick inside"))
    return group(parts)


def _cliff_lines(sheet: Sheet) -> list[Markup]:
    """A bar across the middle of the way from one tie to its neighbour, at each cliff."""
    bars = []
    for step in sheet.cliffs:
        one, other = step.better.point.direction, step.worse.point.direction
        other = other if one @ other >= 0 else -other
        across = np.cross(one, other) / np.linalg.norm(np.cross(one, other))
        middle = (one + other) / np.linalg.norm(one + other)
        half = 0.28 * math.acos(min(1.0, float(one @ other)))
        way = np.array([math.cos(t) * middle + math.sin(t) * across for t in np.linspace(-half, half, 5)])
        ends = [sign for sign in (1.0, -1.0) if (sign * way)[:, 2].max() >= 0]
        d = "".join(_path(on_disc(sign * way), closed=False) for sign in ends)
        bars += [tag("path", d=d, class_="cliff-ground"), tag("path", d=d, class_="cliff")]
    return bars


def shape(region: Region, x: float, y: float, size: float, class_: str) -> Markup:
    """A circle in the areas, a square on V = cK, a triangle on V = cQ, a diamond where logits are symmetric."""
    if region.is_area:
        return tag("circle", cx=x, cy=y, r=size, class_=class_)
    if region is Region.VALUE_IS_KEY:
        s = size * 0.9
        return tag("rect", x=x - s, y=y - s, width=2 * s, height=2 * s, class_=class_)
    r = size * 1.3
    corners = [(0, -r), (r, 0), (0, r), (-r, 0)]
    if region is Region.VALUE_IS_QUERY:
        corners = [(0, -r), (0.95 * r, 0.7 * r), (-0.95 * r, 0.7 * r)]
    d = "M" + " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners) + "Z"
    return tag("path", d=d, class_=class_)


def _mark(place: Place, sheet: Sheet, frame: Frame, colours: Colours, *, is_mute: bool) -> Markup:
    """A tie's mark, on the rim two of them. What it says when it is pointed at is in the page, by the tie's text."""
    size = 5.5 if frame.radius > 200 else 4.0
    class_ = f"marker level-{colours.level(place.value.mean)}"
    ends = [frame.at(place.point)] + ([frame.at(place.point, other_end=True)] if place.point.is_on_rim else [])
    drawn = Markup().join(shape(place.point.region, x, y, size, class_) for x, y in ends)
    if is_mute:
        return drawn
    hits = Markup().join(tag("circle", cx=x, cy=y, r=2.2 * size, class_="hit") for x, y in ends)
    told = f"{place.text}: {metric_name(sheet.metric)} {with_interval(place.value)}, n = {place.value.n}"
    return tag("g", hits + drawn, class_="point", tabindex="0", role="img", aria_label=told, data_tie=place.text)


def _labels(sheet: Sheet, frame: Frame, width: float, height: float) -> list[Markup]:
    """Names where they find room."""
    at = [(*frame.at(place.point), place.text if place.point.is_named else "") for place in sheet.places]
    at += [(*frame.at(place.point, other_end=True), "") for place in sheet.places if place.point.is_on_rim]
    obstacles = [markers.Box(left=x - 8, top=y - 8, right=x + 8, bottom=y + 8) for x, y, _ in at]
    # Marks without a label take part, so that no label is nearer to them than to its own.
    anchors = [markers.Anchor(x=x, y=y, text=text) for x, y, text in at]
    room = markers.Box(left=0, top=22, right=width, bottom=height - FOOT + 26)
    placed = markers.place(anchors, obstacles, [], room).values()
    return markers.labels([label for label in placed if label.text])


def scale(sheet: Sheet, colours: Colours, *, left: float, right: float, y: float) -> Markup:
    """The colours with their values, the best at the left, and where the reference lies."""
    step = (right - left) / LEVELS
    parts = [
        tag("rect", x=left + level * step, y=y, width=step + 0.3, height=BAR_HEIGHT, class_=f"cell level-{level}")
        for level in range(LEVELS)
    ]
    values = [colours.best + share * (colours.worst - colours.best) for share in (0.0, 1 / 3, 2 / 3, 1.0)]
    for value, label, anchor in zip(
        values, tick_labels([float(f"{v:.3g}") for v in values]), ("start", "middle", "middle", "end"), strict=True
    ):
        x = left + colours.share(value) * (right - left)
        parts.append(tag("text", label, x=x, y=y + BAR_HEIGHT + 16, class_="tick", text_anchor=anchor))
    if math.isfinite(sheet.reference.mean):
        x = left + colours.share(sheet.reference.mean) * (right - left)
        parts.append(
            tag(
                "path",
                d=f"M{x:.1f},{y - 1:.1f} {x - 5:.1f},{y - 10:.1f} {x + 5:.1f},{y - 10:.1f}Z",
                class_="reference-mark",
            )
        )
        anchor = "start" if x - left < (right - left) / 2 else "end"
        dx = 9 if anchor == "start" else -9
        parts.append(tag("text", sheet.section.reference.label, x=x + dx, y=y - 2, class_="tick", text_anchor=anchor))
    return group(parts)
