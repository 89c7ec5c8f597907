"""What a Triton kernel of prefill and training is compiled for: what the call computes, and the sizes of its tiles.

Everything that a kernel asks while it is compiled is a field here, so that one value is the whole key of a compiled kernel. No torch and no
Triton is needed to read it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import Literal

Role = Literal["forward", "query_gradient", "stream_gradient"]


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Queries and keys of a tile, warps of a program, how many tiles are on their way at a time, and the most registers of a thread (0: no limit)."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """See :class:`twofold.kernels.inputs.Inputs` for the words.

    ``pairs`` of dimensions turn, i with i + ``distance``; 0: none. ``shares``: a key is its value. ``ragged``: the last block of queries is not full.
    """

    head_dim: int
    causal: bool
    window: bool
    key_mask: bool
    segments: bool
    shares: bool
    scales: bool
    pairs: int
    distance: int
    queries: int = 0
    keys: int = 0
    ragged: bool = True

    def with_tiles(self, tiles: Tiles, num_queries: int) -> Plan:
        """The same with tiles of other sizes, for ``num_queries``."""
        ragged = num_queries % tiles.queries != 0
        return replace(self, queries=tiles.queries, keys=tiles.keys, ragged=ragged)

    @property
    def columns(self) -> int:
        """Of a tile: head_dim or the power of two above it; products want 16 at least."""
        return _columns(self.head_dim)

    @property
    def pair_columns(self) -> int:
        """The same for half of what turns."""
        return _columns(self.pairs)

    @property
    def turns(self) -> bool:
        """Whether keys turn when they are read."""
        return self.pairs > 0

    @property
    def turns_all(self) -> bool:
        """Whether no dimension stays."""
        return self.turns and 2 * self.pairs == self.head_dim

    @property
    def run(self) -> int:
        """So many columns at a time have partners that follow each other."""
        return gcd(self.pairs, self.distance, 16)

    @property
    def hides(self) -> bool:
        """Whether any pair at all may be hidden, so that every tile is masked."""
        return self.key_mask or self.segments

    @property
    def one_sum(self) -> bool:
        """Whether what reaches the stream as key and as value can be added up as it comes."""
        return self.shares and not self.turns and not self.scales

    @property
    def masked_early(self) -> bool:
        """Whether the first queries that see a tile of keys may not see all of it."""
        return (self.causal or self.window) and not self.hides

    @property
    def masked_late(self) -> bool:
        """Whether the last ones may not, or may be fewer than a tile, or any of them where pairs may be hidden anywhere."""
        return self.window or self.hides or self.ragged


def _columns(count: int) -> int:
    return max(16, 1 << (count - 1).bit_length()) if count else 16


@dataclass(frozen=True, kw_only=True)
class _Row:
    """Tiles for heads of up to ``columns``; ``none``, ``some`` or ``all`` of whose dimensions turn. A row of the stream's gradient has ``all`` for two sums."""

    columns: int
    none: Tiles
    some: Tiles
    all: Tiles


def _row(columns: int, *tiles: tuple[int, ...]) -> _Row:
    none, some, all_ = (Tiles(**dict(zip(_FIELDS, one, strict=False))) for one in tiles)
    return _Row(columns=columns, none=none, some=some, all=all_)


_FIELDS = ("queries", "keys", "warps", "stages", "registers")

# What fits a program's 227 KiB, and, as far as it can be had, the registers of its threads, by what ptxas says for an H100. Two programs of 128 registers
# share a multiprocessor: one multiplies while the other takes exponentials. Where there is one, its two groups of four warps do so.
_WIDE: dict[Role, tuple[_Row, ...]] = {
    "forward": (
        _row(64, (128, 64, 8, 3, 128), (128, 64, 8, 2, 128), (128, 64, 8, 3, 128)),
        _row(128, (128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3)),
        _row(256, (128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2)),
    ),
    "query_gradient": (
        _row(64, (64, 64, 4, 3, 168), (128, 32, 8, 3, 128), (128, 64, 8, 3, 128)),
        _row(128, (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 2)),
        _row(256, (128, 32, 8, 2), (64, 32, 8, 2), (128, 32, 8, 2)),
    ),
    "stream_gradient": (
        _row(64, (64, 128, 8, 2, 128), (64, 128, 8, 2), (64, 128, 8, 2)),
        _row(128, (64, 128, 8, 3), (64, 128, 8, 2), (64, 128, 8, 2)),
        _row(256, (32, 128, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2)),
    ),
}
# What fits 99 KiB, the least that a GPU of compute capability 8.0 and above has.
_NARROW: dict[Role, tuple[_Row, ...]] = {
    "forward": (
        _row(64, (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        _row(128, (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
        _row(256, (64, 32, 8, 2), (32, 32, 4, 1), (32, 32, 4, 1)),
    ),
    "query_gradient": (
        _row(64, (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
        _row(128, (64, 32, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
        _row(256, (32, 32, 4, 1), (16, 32, 4, 1), (32, 32, 8, 1)),
    ),
    "stream_gradient": (
        _row(64, (64, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2)),
        _row(128, (32, 64, 8, 2), (32, 64, 8, 1), (32, 64, 8, 1)),
        _row(256, (32, 32, 4, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
    ),
}


def tiles_of(role: Role, plan: Plan, *, itemsize: int, capability: int) -> Tiles:
    """The tiles of a kernel, for tensors of ``itemsize`` bytes, on a GPU whose compute capability begins with ``capability``."""
    if itemsize > 2:  # products of float32 are made by every thread for itself, from registers
        size = 32 if plan.columns < 256 else 16
        return Tiles(queries=size, keys=size, warps=8, stages=1)
    table = _WIDE if capability == 9 else _NARROW
    row = next(row for row in table[role] if plan.columns <= row.columns)
    if role == "stream_gradient":
        return row.none if plan.one_sum else row.all
    return row.all if plan.turns_all else row.some if plan.turns else row.none
