"""Cosines and sines of positions: made once for all layers of a model, and read by the row.

Positions are a :class:`Span` where they are known to this process, and a tensor [S] where only the device knows them (a cache with pre-allocated
room).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from twofold.kernels import Rotation
from twofold.kernels.codes import Held

Angles = Callable[[Tensor], tuple[Tensor, int] | None]


@dataclass(frozen=True)
class Span:
    """Positions ``start`` … ``stop`` - 1. A ``range`` would fix both numbers in a compiled graph, which must serve texts of any length."""

    start: int
    stop: int


Positions = Span | Tensor

# By scheme, length, device and dtype: decoding does not make one for each token.
_TABLES: dict[object, Rotation | None] = {}
_MAX_TABLES = 32


def rotation_at(scheme: object, angles: Angles, positions: Span, like: Held) -> Rotation | None:
    """The rotation at successive positions, in the dtype and on the device of ``like``; None where nothing turns."""
    if torch.compiler.is_compiling():
        # The compiler folds what does not change, and must not be shown a dictionary that does.
        return _table(angles, positions, like)
    length = 1 << max(0, positions.stop - 1).bit_length()
    key = (scheme, length, like.device, like.dtype)
    if key not in _TABLES:
        if len(_TABLES) >= _MAX_TABLES:
            _TABLES.pop(next(iter(_TABLES)))
        with torch.inference_mode(False):  # a table made in inference mode could not be used in training later
            _TABLES[key] = _table(angles, Span(0, length), like)
    return rows(_TABLES[key], positions)


def rows(table: Rotation | None, positions: Positions) -> Rotation | None:
    """The rows of a table that begins at position 0; a negative position, where there is no key yet, has any row."""
    if table is None:
        return None
    if isinstance(positions, Tensor):
        index = positions.clamp(min=0)
        return Rotation(cosine=table.cosine[index], sine=table.sine[index], distance=table.distance)
    part = slice(positions.start, positions.stop)
    steady = None if table.steady is None else (table.steady[0][part], table.steady[1][part])
    return Rotation(cosine=table.cosine[part], sine=table.sine[part], distance=table.distance, steady=steady)


def indices(positions: Positions, device: torch.device) -> Tensor:
    """Positions as a tensor [S]."""
    if isinstance(positions, Tensor):
        return positions
    return torch.arange(positions.start, positions.stop, device=device)


def _table(angles: Angles, positions: Span, like: Held) -> Rotation | None:
    found = angles(indices(positions, like.device))
    if found is None:
        return None
    turned, distance = found
    cosine, sine = turned.cos(), turned.sin()
    steady = (cosine.float(), sine.float())
    return Rotation(cosine=cosine.to(like.dtype), sine=sine.to(like.dtype), distance=distance, steady=steady)
