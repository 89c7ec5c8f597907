"""The plane of linear ties: one equation aQ + bK + cV = 0 is a point [a : b : c] of the real projective plane.

A point is drawn as its direction on the upper half-sphere, where V = pQ + qK is (p, q, 1) on its way to unit length: right is Q's share of V, up is
K's, and the further out, the larger both. On the rim c = 0: V is free, Q and K are multiples of each other, and opposite points of the rim are one
tie. The corners [1 : 0 : 0], [0 : 1 : 0] and [0 : 0 : 1] make a role zero and are no ties.

Most of the plane is one function in other units. For s, t ≠ 0 the layers of a tie are those of its image under Q → sQ, K → K/s, V → tV, because the
logits stay and W_O absorbs t; where V is free, logits of cKKᵀ are those of ±KKᵀ in other units. So the plane falls into the six
:class:`Region`: the signs of the three numbers decide which functions a layer can compute, and their sizes do not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from math import gcd

import numpy as np
from numpy.typing import NDArray

from twofold.tie import Tie

Numbers = tuple[int, int, int]

# Two angles, or cosines, that differ by less are the same.
TOLERANCE = 1e-9


class Region(StrEnum):
    """Ties of one region compute the same functions."""

    SAME_SIGNS = "V mixes Q and K with equal signs"
    OPPOSITE_SIGNS = "V mixes Q and K with opposite signs"
    VALUE_IS_KEY = "V is a multiple of K: one cached tensor"
    VALUE_IS_QUERY = "V is a multiple of Q"
    EQUAL_QUERY_KEY = "Q is a positive multiple of K: symmetric logits"
    OPPOSITE_QUERY_KEY = "Q is a negative multiple of K: symmetric logits"

    @property
    def is_area(self) -> bool:
        """Whether it is an area of the plane; the others are lines."""
        return self in (Region.SAME_SIGNS, Region.OPPOSITE_SIGNS)


@dataclass(frozen=True)
class Point:
    """A tie of one equation: coprime whole ``numbers`` (a, b, c), the last that is not 0 being positive."""

    numbers: Numbers

    @cached_property
    def tie(self) -> Tie:
        """The tie; raises TwofoldError for a corner."""
        return Tie.from_equations([self.numbers])

    @property
    def region(self) -> Region:
        """Which functions a layer with the tie can compute."""
        a, b, c = self.numbers
        if not c:
            return Region.EQUAL_QUERY_KEY if a * b < 0 else Region.OPPOSITE_QUERY_KEY
        if not a:
            return Region.VALUE_IS_KEY
        if not b:
            return Region.VALUE_IS_QUERY
        return Region.SAME_SIGNS if a * b > 0 else Region.OPPOSITE_SIGNS

    @property
    def is_named(self) -> bool:
        """Whether a picture gives it a label: its numbers are 0 and ±1, or V is the mean of Q and K."""
        return max(map(abs, self.numbers)) == 1 or self.numbers == (-1, -1, 2)

    @property
    def mirror(self) -> Point | None:
        """The tie with -V for V, the same functions by W_O's sign; None where that is the tie itself."""
        a, b, c = self.numbers
        return point([-a, -b, c]) if c else None

    @cached_property
    def direction(self) -> NDArray[np.float64]:
        """The unit vector [3] (p, q, 1) / length for V = pQ + qK."""
        a, b, c = self.numbers
        return np.array([-a, -b, c], dtype=np.float64) / math.sqrt(a * a + b * b + c * c)

    @property
    def is_on_rim(self) -> bool:
        """Whether a picture shows it twice."""
        return not self.numbers[2]


def point(numbers: Iterable[int]) -> Point:
    """The point of any multiple of (a, b, c).

    >>> point([2, -2, -2]).tie
    Tie("V = Q - K")
    """
    whole = list(numbers)
    last = next(number for number in reversed(whole) if number)
    divisor = gcd(*whole) * (1 if last > 0 else -1)
    a, b, c = (number // divisor for number in whole)
    return Point((a, b, c))


def point_of(tie: Tie) -> Point | None:
    """Where a tie lies; None for one of no equation or of two, and for 2-D positions, which are no matter of the plane.

    >>> point_of(Tie.parse("(Q, K=V)")).numbers
    (0, -1, 1)
    """
    return point(tie.equations[0]) if len(tie.equations) == 1 and not tie.plus else None


def covering() -> tuple[Point, ...]:
    """70 points that cover the plane evenly and look the same from all three roles, the simplest first.

    All whole numbers up to 2 but the corners, and around each corner those of a 4 and numbers up to 1. Any tie is within 14.1° of one of them, and no
    two are closer than 12.5°.
    """
    small = [n for n in itertools.product(range(-2, 3), repeat=3) if np.count_nonzero(n) > 1]
    near_corners = [n for n in itertools.product((-4, -1, 0, 1, 4), repeat=3) if sorted(map(abs, n))[1:] == [1, 4]]
    points = {point(numbers) for numbers in (*small, *near_corners)}
    return tuple(sorted(points, key=_simplest_first))


def _simplest_first(place: Point) -> tuple[int, int, Numbers]:
    sizes = [abs(number) for number in place.numbers]
    return max(sizes), sum(sizes), place.numbers


def angle(one: Point, other: Point) -> float:
    """Degrees between two points, up to 90: on the plane a direction and its opposite are one."""
    return math.degrees(math.acos(min(1.0, abs(float(one.direction @ other.direction)))))


def neighbours(points: Sequence[Point]) -> list[tuple[int, int]]:
    """Pairs of indices of points that have no third one between them.

    That is, no other point lies within the circle whose diameter is the way from one to the other.
    Source: Gabriel and Sokal, "A new statistical approach to geographic variation analysis", 1969.
    """
    directions = np.array([place.direction for place in points])
    pairs = []
    for i, j in itertools.combinations(range(len(points)), 2):
        sign = -1.0 if directions[i] @ directions[j] < 0 else 1.0
        middle = directions[i] + sign * directions[j]
        reach = np.abs(directions @ middle)
        reach[[i, j]] = 0.0
        if reach.max(initial=0.0) <= directions[i] @ middle + TOLERANCE:
            pairs.append((i, j))
    return pairs


def on_disc(directions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Unit vectors [..., 3] on the disc [..., 2] of radius 1, equal areas staying equal; those of the lower half lie beyond the rim.

    Source: Lambert 1772, the azimuthal equal-area projection.
    """
    flat: NDArray[np.float64] = directions[..., :2] / np.sqrt(np.maximum(1.0 + directions[..., 2:], TOLERANCE))
    return flat
