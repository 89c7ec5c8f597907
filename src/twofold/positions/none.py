"""No positions: attention sees a set (or, under a causal mask, only the order of growth)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from twofold.positions.scheme import PositionScheme


@dataclass(frozen=True, kw_only=True)
class NoPositions(PositionScheme):
    """Nothing is added and nothing turns."""

    kind: ClassVar[str] = "none"
