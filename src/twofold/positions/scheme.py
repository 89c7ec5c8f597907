"""What every position scheme answers. The defaults are those of a scheme that does nothing."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class PositionScheme:
    """A frozen dataclass; subclasses override what they need."""

    kind: ClassVar[str]

    @property
    def key_extension_dim(self) -> int:
        """Dimensions of a separate one-head key that is appended to every key and cached once per token; 0 for most schemes."""
        return 0

    @property
    def max_positions(self) -> int:
        """Rows of the table of learned positions that the model adds to its embeddings; 0 for most schemes."""
        return 0

    def check(self, *, head_dim: int, value_over_key: Fraction | None) -> None:
        """Raise TwofoldError if the scheme cannot serve such a layer."""
