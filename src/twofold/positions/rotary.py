"""Rotary positions: full, partial, proportional; keys turned on reading, or the cached stream itself turned."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

from twofold.positions.scheme import PositionScheme


@dataclass(frozen=True, kw_only=True)
class RotaryPositions(PositionScheme):
    """``fraction`` of the dimensions turn (1.0: all)."""

    kind: ClassVar[str] = "rotary"

    theta: float = 10000.0
    fraction: float = 1.0
    proportional: bool = False
    rotate: Literal["read", "stream"] = "read"

    def check(self, *, head_dim: int, value_over_key: Fraction | None) -> None:
        """The number of dimensions that turn must be even."""
