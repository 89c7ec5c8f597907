"""A result as a value: what was measured, the number with its interval, and where it came from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from twofold.study.statistics import Interval


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a result came from. ``page`` is what a reader opens, relative to the folder of results; ``digest`` is of the file that was read.

    ``state`` says how far an unfinished study is, ``caution`` which of its controls on this task did not come out as promised.
    """

    command: str
    page: str = ""
    digest: str = ""
    code: str = ""
    data: str = ""
    machine: str = ""
    state: str = ""
    caution: str = ""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One result: ``what`` in words, the mean with its interval, and its unit. ``is_exact``: counted, so without chance, or measured once.

    ``doubt`` is why it decides nothing, if it does not.
    """

    what: str
    shown: Interval
    unit: str
    origin: Origin
    is_exact: bool = False
    is_difference: bool = True
    doubt: str = ""


@dataclass(frozen=True, kw_only=True)
class Missing:
    """Why there is no result yet."""

    reason: str


def exact(value: float, method: str = "") -> Interval:
    """A number without an interval: without chance, or ``method`` says why there is none."""
    return Interval(mean=value, low=value, high=value, n=1, method=method)


def from_json(values: Mapping[str, Any]) -> Interval:
    """An interval as JSON holds it, with ``mean`` or ``value``; what has no value is null there, and without ``n`` n is 0."""
    names = ("mean" if "mean" in values else "value", "low", "high")
    mean, low, high = (math.nan if values[name] is None else float(values[name]) for name in names)
    return Interval(mean=mean, low=low, high=high, n=int(values.get("n", 0)), method=str(values.get("method", "")))


def scaled(shown: Interval, factor: float) -> Interval:
    """The same in another unit, by a positive factor."""
    mean, low, high = (value * factor for value in (shown.mean, shown.low, shown.high))
    return Interval(mean=mean, low=low, high=high, n=shown.n, method=shown.method)


def turned(shown: Interval) -> Interval:
    """A difference the other way round."""
    return Interval(mean=-shown.mean, low=-shown.high, high=-shown.low, n=shown.n, method=shown.method)
