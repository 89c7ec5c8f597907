"""Streams as codes of 8 bits that kernels read as they are held: x ≈ scale · code, one scale for each token of a head, and no zero point.

A scale is max|x| / 127 in float32 whatever the stream's dtype is, so a float is off by half of its scale at most. Without a zero point a product with a
key is a product with its codes, times a number: nothing is made of the codes before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_CODE = 127
LEAST = 1e-30
"""A head of zeros has no scale of its own: any will do but 0."""


@dataclass(frozen=True, kw_only=True)
class Codes:
    """A stream: ``codes`` [B, G, S, D] of int8, ``scales`` [B, G, S, 1] of float32, and the ``dtype`` of the floats that they stand for."""

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """[B, G, S, D]."""
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.codes.device


def encoded(stream: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a stream [B, G, S, D]; no gradient passes. A head that holds what is not a number is read as nothing else."""
    stream = stream.detach()
    scales = stream.abs().amax(dim=-1, keepdim=True).float().clamp_min(LEAST) / MAX_CODE
    return (stream / scales).round_().to(torch.int8), scales


def scaled(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers times their scales, rounded once: a scale by itself may be too small for float16."""
    wide = torch.promote_types(dtype, scales.dtype)
    return (numbers.to(wide) * scales).to(dtype)


# What a cache gives: a stream as it was computed, or as codes.

Held = Tensor | Codes


def floats_of(held: Held) -> Tensor:
    """[B, G, S, D] in the stream's dtype."""
    return scaled(held.codes, held.scales, held.dtype) if isinstance(held, Codes) else held


def numbers_of(held: Held) -> Tensor:
    """The tensor that is held: floats or codes."""
    return held.codes if isinstance(held, Codes) else held


def scales_of(held: Held) -> Tensor | None:
    """What the numbers are to be multiplied by."""
    return held.scales if isinstance(held, Codes) else None
