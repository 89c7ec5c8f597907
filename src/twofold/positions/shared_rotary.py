"""A separate one-head rotary key appended to every key, so that the tied part stays un-rotated (as MLA and GTA do)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from twofold.errors import TwofoldError
from twofold.positions.rotary import rotary_angles
from twofold.positions.scheme import PositionScheme

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SharedRotaryPositions(PositionScheme):
    """``dim`` dimensions (d_r), all of which turn: logit = (q·k + r_q·r_k) / √(D + d_r), r_k being one for all heads.

    Source: DeepSeek-V2 (2405.04434), equations 14 to 19; GTA (2505.21487) shares one rotary half in the same way.
    """

    kind: ClassVar[str] = "shared_rotary"

    dim: int
    theta: float = 10000.0

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise TwofoldError(
                f"A shared rotary key of {self.dim} dimensions cannot turn in pairs: use an even number of at least 2."
            )
        if not self.theta > 0:
            raise TwofoldError(f"theta is {self.theta}, but rotary frequencies are powers of a positive number.")

    @property
    def key_extension_dim(self) -> int:
        """d_r."""
        return self.dim

    def extension_angles(self, positions: Tensor) -> tuple[Tensor, int]:
        """Angles [S, d_r / 2] of the separate key, and the distance of a pair."""
        return rotary_angles(positions, theta=self.theta, pairs=self.dim // 2, base=self.dim), self.dim // 2
