"""A separate one-head rotary key appended to every key, so that the tied part stays un-rotated (as MLA and GTA do)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from twofold.positions.scheme import PositionScheme


@dataclass(frozen=True, kw_only=True)
class SharedRotaryPositions(PositionScheme):
    """``dim`` dimensions (d_r), all of which turn."""

    kind: ClassVar[str] = "shared_rotary"

    dim: int
    theta: float = 10000.0

    @property
    def key_extension_dim(self) -> int:
        """d_r."""
        return self.dim
