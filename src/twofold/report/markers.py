"""Points that can be told apart without colour, and labels that keep out of each other's way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from markupsafe import Markup

from twofold.report.drawing import tag, text_width

LABEL_SIZE = 13
LINE_HEIGHT = 15
# Distances at which a label is tried, nearest first, in steps of a third of a line.
_TRIED_OFFSETS = sorted(range(-12, 13), key=abs)


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangle, in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether the two share any area."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def inside(self, other: Box) -> bool:
        """Whether this one lies wholly in the other."""
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )

    def distance(self, x: float, y: float) -> float:
        """How far the point lies outside; 0 inside."""
        return math.hypot(max(self.left - x, 0, x - self.right), max(self.top - y, 0, y - self.bottom))


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """A point that wants a label."""

    x: float
    y: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where a label stands: its baseline, and whether it needs a line to its point."""

    x: float
    y: float
    text: str
    end: bool
    leader: tuple[tuple[float, float], tuple[float, float]] | None

    @cached_property
    def box(self) -> Box:
        """The room the text takes."""
        width = text_width(self.text, LABEL_SIZE)
        left = self.x - width if self.end else self.x
        return Box(left=left, top=self.y - 11, right=left + width, bottom=self.y + 4)


def marker(kind: str, x: float, y: float, *, size: float = 5.5, class_: str = "") -> Markup:
    """A tie is a filled disc, a control an open square, the reference a filled diamond."""
    classes = f"marker {kind} {class_}".strip()
    if kind == "control":
        return tag("rect", x=x - size, y=y - size, width=2 * size, height=2 * size, rx=1.5, class_=classes)
    if kind == "reference":
        r = size * 1.35
        return tag(
            "path",
            d=f"M{x:.2f},{y - r:.2f} {x + r:.2f},{y:.2f} {x:.2f},{y + r:.2f} {x - r:.2f},{y:.2f}Z",
            class_=classes,
        )
    return tag("circle", cx=x, cy=y, r=size, class_=classes)


def place(anchors: Sequence[Anchor], obstacles: Sequence[Box], avoided: Sequence[Box], room: Box) -> dict[int, Placed]:
    """A place for each label that fits in ``room`` without touching an obstacle or another label; others are left out.

    Index of the anchor -> place. Nearer places are tried first: beside the point, then higher and lower on either side. Of what is only
    ``avoided`` as little is touched as can be.
    """
    taken = list(obstacles)
    placed: dict[int, Placed] = {}
    for index in sorted(range(len(anchors)), key=lambda i: (-anchors[i].x, anchors[i].y)):
        free = [
            candidate
            for candidate in _candidates(anchors[index])
            if candidate.box.inside(room)
            and not any(candidate.box.meets(other) for other in taken)
            and _is_plain(anchors[index], candidate, anchors)
        ]
        if free:
            # min keeps the nearest of those that touch equally little.
            best = min(free, key=lambda candidate: sum(candidate.box.meets(other) for other in avoided))
            placed[index] = best
            taken.append(best.box)
    return placed


def _is_plain(own: Anchor, placed: Placed, anchors: Sequence[Anchor]) -> bool:
    """Whether the label is nearer to its own point than to any other, so that it is read as that one's."""
    distance = placed.box.distance(own.x, own.y)
    return all(other is own or placed.box.distance(other.x, other.y) > distance for other in anchors)


def _candidates(anchor: Anchor) -> Iterator[Placed]:
    for offset in _TRIED_OFFSETS:
        dy = offset * LINE_HEIGHT / 3
        for end in (False, True):
            for reach in (10, 24) if abs(dy) > 5 else (10,):
                side = -1 if end else 1
                x, y = anchor.x + side * reach, anchor.y + dy + 4.5
                far = abs(dy) > 9 or reach > 10
                leader = ((anchor.x + side * 5, anchor.y + dy * 0.3), (x - side * 2, y - 4.5)) if far else None
                yield Placed(x=x, y=y, text=anchor.text, end=end, leader=leader)
    for dy in (-10, 19):
        width = text_width(anchor.text, LABEL_SIZE)
        yield Placed(x=anchor.x - width / 2, y=anchor.y + dy, text=anchor.text, end=False, leader=None)


def labels(placed: Sequence[Placed]) -> list[Markup]:
    """The texts, and the thin lines that lead to them."""
    lines = [
        tag("line", x1=a[0], y1=a[1], x2=b[0], y2=b[1], class_="leader")
        for a, b in (label.leader for label in placed if label.leader)
    ]
    texts = [
        tag("text", label.text, x=label.x, y=label.y, class_="label", text_anchor="end" if label.end else None)
        for label in placed
    ]
    return lines + texts
