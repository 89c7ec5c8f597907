"""Floats as 4 or 8 bits: rounded between the least and the greatest of their group, and packed into bytes.

With n bits, a group with least a and greatest b has the scale s = (b - a) / (2ⁿ - 1) and the zero point a; x is stored as round((x - a) / s) and read
as a + s · code, which is off by no more than s / 2 and what the dtype of s and a rounds. Source of the scheme: Liu et al. 2024 (KIVI, 2402.02750).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from twofold.cache_spec import CacheSpec


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A stream [B, G, S, D] in few bits: ``codes`` [B, G, S, D · bits / 8] of uint8, ``scale`` and ``zero`` in the stream's dtype.

    Per token they are [B, G, S, D / g], g floats sharing a scale; per channel [B, G, S / g, D], g tokens sharing one.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All that is held."""
        return self.codes, self.scale, self.zero

    def followed_by(self, other: Self) -> Quantized:
        """The tokens of both, in this order."""
        codes, scale, zero = (torch.cat(pair, dim=-2) for pair in zip(self.tensors, other.tensors, strict=True))
        return Quantized(codes=codes, scale=scale, zero=zero)

    def changed(self, change: Callable[[Tensor], Tensor]) -> Quantized:
        """Every tensor replaced."""
        return Quantized(codes=change(self.codes), scale=change(self.scale), zero=change(self.zero))

    def first(self, tokens: int, spec: CacheSpec) -> Quantized:
        """The first ``tokens`` of them, which are whole groups, without the memory of the others."""
        groups = tokens if spec.axis == "token" else tokens // spec.group_size
        cut = {
            "codes": self.codes[..., :tokens, :],
            "scale": self.scale[..., :groups, :],
            "zero": self.zero[..., :groups, :],
        }
        return Quantized(**{name: tensor.clone() for name, tensor in cut.items()})

    def read(self, spec: CacheSpec) -> Tensor:
        """[B, G, S, D] in the dtype of the scale."""
        codes = _unpacked(self.codes, spec.bits)
        grouped = _grouped(codes, spec)
        scale, zero = (_for_groups(tensor, spec) for tensor in (self.scale, self.zero))
        return torch.addcmul(zero, grouped.to(scale.dtype), scale).reshape(codes.shape)


def quantize(stream: Tensor, spec: CacheSpec) -> Quantized:
    """A stream [B, G, S, D] in ``spec.bits`` bits; per channel S must be whole groups."""
    grouped = _grouped(stream, spec)
    axis = -1 if spec.axis == "token" else -2
    least, greatest = grouped.aminmax(dim=axis, keepdim=True)
    scale = (greatest - least) / (2**spec.bits - 1)
    # A group of equal floats has no range: its codes are 0, and any scale will do.
    steps = (grouped - least) / torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = steps.round_().clamp_(0, 2**spec.bits - 1).to(torch.uint8).reshape(stream.shape)
    return Quantized(codes=_packed(codes, spec.bits), scale=scale.squeeze(axis), zero=least.squeeze(axis))


def _grouped(stream: Tensor, spec: CacheSpec) -> Tensor:
    """[B, G, S, D] -> [B, G, S, D / g, g] per token, [B, G, S / g, g, D] per channel: a view."""
    if spec.axis == "token":
        return stream.unflatten(-1, (-1, spec.group(stream.shape[-1])))
    return stream.unflatten(-2, (-1, spec.group_size))


def _for_groups(tensor: Tensor, spec: CacheSpec) -> Tensor:
    return tensor.unsqueeze(-1 if spec.axis == "token" else -2)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Two codes of 4 bits to a byte: the first half of a head's floats in the low bits, the second half in the high ones."""
    if bits == 8:
        return codes
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4)


def _unpacked(codes: Tensor, bits: int) -> Tensor:
    return codes if bits == 8 else torch.cat((codes & 15, codes >> 4), dim=-1)
