"""A separate one-head rotary key appended to every key, so that the tied part stays un-rotated (as MLA and GTA do)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Self

from twofold.errors import TwofoldError
from twofold.positions.rotary import rotary_angles
from twofold.positions.scheme import PositionScheme

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SharedRotaryPositions(PositionScheme):
    """``dim`` dimensions (d_r), all of which turn: logit = (q·k + r_q·r_k) / √(D + d_r), r_k being one for all heads.

    With ``key_dim`` > 0 only the first ``key_dim`` dimensions of the tied stream are compared, while the value has all of them: with D / 2 for
    both numbers and ``(Q, K=V)`` that is GTA, K = [first half of the stream ; shared rotary key].

    Source: DeepSeek-V2 (2405.04434), equations 14 to 19; GTA (2505.21487), section 3.
    """

    kind: ClassVar[str] = "shared_rotary"

    dim: int
    theta: float = 10000.0
    key_dim: int = 0

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise TwofoldError(
                f"A shared rotary key of {self.dim} dimensions cannot turn in pairs: use an even number of at least 2."
            )
        if not self.theta > 0:
            raise TwofoldError(f"theta is {self.theta}, but rotary frequencies are powers of a positive number.")

    def compared_dims(self, head_dim: int) -> int:
        """``key_dim``, if it is set."""
        return self.key_dim or head_dim

    def without_tie(self) -> Self:
        """All dimensions are compared: none is the value's alone."""
        return replace(self, key_dim=0)

    def check(self, *, head_dim: int, value_over_key: Fraction | None) -> None:
        """Raise TwofoldError if the scheme cannot serve such a layer."""
        if not 0 <= self.key_dim <= head_dim:
            raise TwofoldError(
                f"key_dim is {self.key_dim}, but a head has {head_dim} dimensions: use 0 to compare all of them."
            )
        if self.key_dim and value_over_key is None:
            raise TwofoldError(
                "key_dim leaves dimensions to the value alone, so it needs a tie in which V is a multiple of K, such as (Q, K=V)."
            )

    @property
    def key_extension_dim(self) -> int:
        """d_r."""
        return self.dim

    def extension_angles(self, positions: Tensor) -> tuple[Tensor, int]:
        """Angles [S, d_r / 2] of the separate key, and the distance of a pair."""
        return rotary_angles(positions, theta=self.theta, pairs=self.dim // 2, base=self.dim), self.dim // 2
