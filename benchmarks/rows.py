"""What a benchmark says: rows ``{"name", "value", "unit", "goal", "met"}``, and the table of them.

A goal is ``<= x`` or ``>= x``; a row without one (None) is there to be read, and its ``met`` is None too.
"""

from __future__ import annotations

import json
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Row = dict[str, Any]


def row(name: str, value: float, unit: str, goal: str | None = None) -> Row:
    """One row.

    >>> row("time", 1.2, "ratio", "<= 1.03")["met"]
    False
    """
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "goal": goal,
        "met": None if goal is None else meets(value, goal),
    }


def meets(value: float, goal: str) -> bool:
    """Whether a value is as its goal has it."""
    sign, bound = goal.split()
    return value <= float(bound) if sign == "<=" else value >= float(bound)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over rounds of the ratio within a round: a machine that is busy in some rounds is busy for both."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def in_turn(names: Sequence[str], round_index: int) -> list[str]:
    """All names, in each round from another one on, so that none is always the first after another.

    >>> in_turn(["a", "b", "c"], 4)
    ['b', 'c', 'a']
    """
    start = round_index % len(names)
    return [*names[start:], *names[:start]]


def left_out(what: str, error: BaseException) -> None:
    """Say that something of a peer's is not measured, and why."""
    reason = str(error).strip().splitlines() or [type(error).__name__]
    print(f"{what} is left out: {reason[0][:120]}", file=sys.stderr, flush=True)


@contextmanager
def shown(*, as_json: bool) -> Iterator[list[Row]]:
    """Rows to add to, which are shown at the end: also when an error ends it, or ``timeout`` does, so that what was measured is not lost."""
    rows: list[Row] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield rows
    finally:
        signal.signal(signal.SIGTERM, before)
        if rows:
            show(rows, as_json=as_json)


def show(rows: Sequence[Row], *, as_json: bool) -> None:
    """Print the rows, for programs or as a table."""
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    width = max(len(row["name"]) for row in rows) + 1
    for row in rows:
        verdict = "" if row["met"] is None else f"{row['goal']:>9}  {'met' if row['met'] else 'NOT MET'}"
        print(f"{row['name']:<{width}} {row['value']:>12,.3f} {row['unit']:<10} {verdict}".rstrip())
