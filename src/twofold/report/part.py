"""What a part of a report is made of: words, one figure, tables, and the numbers behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup


@dataclass(frozen=True, kw_only=True)
class Table:
    """Strings, ready to be shown; the first column names the rows."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Part:
    """``name`` is also the name of the figure's file; ``figure`` draws at a width in pixels; ``values`` is for programs (NaN: no value)."""

    name: str
    title: str
    sentences: Sequence[str]
    caption: str
    figure: Callable[[float], Markup] = field(repr=False)
    tables: Sequence[Table]
    values: Mapping[str, Any]
