"""What every position scheme answers, and what it may do. The defaults are those of a scheme that does nothing.

A new scheme is one file with a frozen dataclass that overrides what it needs, and its name in ``SCHEMES``. There are four places where
positions can enter: rows that the model adds to its embeddings (``max_positions``), the turning of queries and keys (``angles``), a separate
key that all heads share (``key_extension_dim``), and numbers added to the logits (``num_bias_buckets``).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Self

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PositionScheme:
    """A frozen dataclass; subclasses override what they need. T and S count queries and keys."""

    kind: ClassVar[str]

    @property
    def key_extension_dim(self) -> int:
        """Dimensions of a separate one-head key that is appended to every key and cached once per token; 0 for most schemes."""
        return 0

    def compared_dims(self, head_dim: int) -> int:
        """How many dimensions of a head's key are compared with the query; the value has all of them."""
        return head_dim

    @property
    def max_positions(self) -> int:
        """Rows of the table of learned positions that the model adds to its embeddings; 0 for most schemes."""
        return 0

    @property
    def num_bias_buckets(self) -> int:
        """Learned numbers per head that are added to the logits, picked by :meth:`buckets`; 0 for most schemes."""
        return 0

    @property
    def turns_stream(self) -> bool:
        """Whether the cached stream itself is turned, serves as key and as value, and the head's output is turned back."""
        return False

    @property
    def turns_heads(self) -> bool:
        """Whether the scheme turns queries and keys themselves, by :meth:`angles`."""
        return type(self).angles is not PositionScheme.angles

    def without_tie(self) -> Self:
        """The same for a layer whose keys and values have nothing in common."""
        return self

    def check(self, *, head_dim: int, value_over_key: Fraction | None) -> None:
        """Raise TwofoldError if the scheme cannot serve such a layer."""

    def angles(self, positions: Tensor, *, head_dim: int) -> tuple[Tensor, int] | None:
        """How far each pair of dimensions of a query or key at ``positions`` [S] turns, or None if nothing turns.

        The angles [S, n] in radians, and the distance d of a pair: dimension i turns with dimension i + d, for i < n.
        """
        del positions, head_dim
        return None

    def extension_angles(self, positions: Tensor) -> tuple[Tensor, int]:
        """:meth:`angles` of the separate key; asked only where ``key_extension_dim`` > 0."""
        raise NotImplementedError

    def buckets(self, query_positions: Tensor, key_positions: Tensor, *, causal: bool) -> Tensor:
        """The bucket [T, S] of each pair of positions [T] and [S]; asked only where ``num_bias_buckets`` > 0."""
        raise NotImplementedError
