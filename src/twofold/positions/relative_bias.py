"""T5's relative bias: one learned number per head and bucket of distance, added to the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from twofold.positions.scheme import PositionScheme


@dataclass(frozen=True, kw_only=True)
class RelativeBiasPositions(PositionScheme):
    """Source: Raffel et al. 2020 (1910.10683), section 2.1."""

    kind: ClassVar[str] = "relative_bias"

    num_buckets: int = 32
    max_distance: int = 128
