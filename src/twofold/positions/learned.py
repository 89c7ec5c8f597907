"""Learned absolute positions: a table added to the embeddings by the model; attention itself does not see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from twofold.errors import TwofoldError
from twofold.positions.scheme import PositionScheme


@dataclass(frozen=True, kw_only=True)
class LearnedPositions(PositionScheme):
    """``length`` rows of hidden_size floats, as in GPT-2."""

    kind: ClassVar[str] = "learned"

    length: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise TwofoldError(f"Learned positions need a length of at least 1, not {self.length}.")

    @property
    def max_positions(self) -> int:
        """The table's rows."""
        return self.length
