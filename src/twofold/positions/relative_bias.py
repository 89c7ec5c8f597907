"""T5's relative bias: one learned number per head and bucket of distance, added to the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from twofold.errors import TwofoldError
from twofold.positions.scheme import PositionScheme

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RelativeBiasPositions(PositionScheme):
    """Buckets for distances: half of them exact, half logarithmic up to ``max_distance``, beyond which all share the last.

    A layer that is not causal splits the buckets between keys before and keys after the query. Each layer has numbers of its own.
    Source: Raffel et al. 2020 (1910.10683), section 2.1.
    """

    kind: ClassVar[str] = "relative_bias"

    num_buckets: int = 32
    max_distance: int = 128

    def __post_init__(self) -> None:
        if self.num_buckets < 4 or self.num_buckets % 4:
            raise TwofoldError(f"num_buckets is {self.num_buckets}, but buckets are halved twice: use a multiple of 4.")
        if self.max_distance <= self.num_buckets // 2:
            raise TwofoldError(
                f"max_distance is {self.max_distance}, but the first {self.num_buckets // 2} distances have buckets of their own: use more."
            )

    @property
    def num_bias_buckets(self) -> int:
        """The layer's learned numbers per head."""
        return self.num_buckets

    def buckets(self, query_positions: Tensor, key_positions: Tensor, *, causal: bool) -> Tensor:
        """[T] and [S] -> [T, S], whole numbers below ``num_buckets``."""
        behind = query_positions[:, None] - key_positions[None, :]
        count, first = self.num_buckets, behind * 0
        if causal:
            distance = behind.clamp(min=0)
        else:
            count //= 2
            first, distance = count * (behind < 0).long(), behind.abs()
        exact = count // 2
        spread = (distance.clamp(min=1).double() / exact).log() / math.log(self.max_distance / exact)
        far = (exact + spread * (count - exact)).long().clamp(max=count - 1)
        return first + distance.where(distance < exact, far)
