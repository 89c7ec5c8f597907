"""Scores by place: predictions are sorted into buckets of powers of two, so that near and far can be told apart.

A bucket's metric is its metric's name and its range, ``bits_per_byte@16-31``. Buckets are a partition: counts and sums over all of them are
those of the whole, exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

NAMED = re.compile(r"(?P<metric>[^@]+)@(?P<first>\d+)-(?P<last>\d+)")


def buckets(first: int, last: int, *, start: int = 16) -> list[tuple[int, int]]:
    """All numbers from ``first`` to ``last`` in ranges that begin at powers of two; those below ``start`` are one range.

    >>> buckets(1, 127)
    [(1, 15), (16, 31), (32, 63), (64, 127)]
    >>> buckets(2, 20, start=4)
    [(2, 3), (4, 7), (8, 15), (16, 20)]
    """
    found, low, end = [], first, start
    while low <= last:
        if low < end:
            found.append((low, min(end - 1, last)))
            low = end
        end *= 2
    return found


def sums(places: Tensor, values: Mapping[str, Tensor], ranges: list[tuple[int, int]]) -> dict[str, Tensor]:
    """For each name in ``values`` and each range, ``NAME@FIRST-LAST``: the float64 sum of those values whose place lies in it.

    ``places`` (integers) and all values have one shape, or shapes that broadcast to that of the values.
    """
    found = {}
    for low, high in ranges:
        inside = (places >= low) & (places <= high)
        for name, value in values.items():
            found[f"{name}@{low}-{high}"] = torch.where(inside, value.double(), 0.0).sum()
    return found


def ranges_in(names: Mapping[str, float], metric: str) -> Iterator[tuple[str, float]]:
    """``FIRST-LAST`` and value of all that is named after ``metric``."""
    for name, value in names.items():
        if (found := NAMED.fullmatch(name)) and found["metric"] == metric:
            yield name.partition("@")[2], value
