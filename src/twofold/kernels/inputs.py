"""What every backend is given: tensors, a mask said in words, and how keys turn when they are read.

Shapes: B batch, T queries, S keys, H query heads, G KV heads, D head_dim, d_r length of the key that all heads share. Query head h reads KV
head h // (H / G). The T queries are those of the last T of the S keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Turns dimension i with dimension i + ``distance`` for i < n.

    ``cosine`` and ``sine`` are [S, n], one row per position, or [B, 1, S, n] where the texts of a batch stand at positions of their own.
    """

    cosine: Tensor
    sine: Tensor
    distance: int

    def turn(self, x: Tensor) -> Tensor:
        """(a, b) -> (a cos - b sin, b cos + a sin) for every pair of x [..., S, D]; the other dimensions stay as they are."""
        n = self.cosine.shape[-1]
        a, b = x[..., :n], x[..., self.distance : self.distance + n]
        parts = [a * self.cosine - b * self.sine]
        if self.distance > n:
            parts.append(x[..., n : self.distance])
        parts.append(b * self.cosine + a * self.sine)
        if x.shape[-1] > self.distance + n:
            parts.append(x[..., self.distance + n :])
        return torch.cat(parts, dim=-1)

    def turned(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Of x [..., S, D], times ``scale`` [D], the dimensions that turn alone, turned: [..., S, 2n], first all a, then all b."""
        turning = self.turning(x) if scale is None else self.turning(x) * self.turning(scale)
        a, b = turning.chunk(2, dim=-1)
        first = torch.addcmul(a * self.cosine, b, self.sine, value=-1)
        return torch.cat((first, torch.addcmul(b * self.cosine, a, self.sine)), dim=-1)

    def turning(self, x: Tensor) -> Tensor:
        """The dimensions that turn, as they are: [..., D] -> [..., 2n]."""
        n = self.cosine.shape[-1]
        return torch.cat((x[..., :n], x[..., self.distance : self.distance + n]), dim=-1)

    def without_turning(self, x: Tensor) -> Tensor:
        """A copy of x [..., D] with 0 in the dimensions that turn."""
        n, rest = self.cosine.shape[-1], x.clone()
        rest[..., :n] = 0
        rest[..., self.distance : self.distance + n] = 0
        return rest

    def turn_back(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`turn`."""
        return Rotation(cosine=self.cosine, sine=-self.sine, distance=self.distance).turn(x)


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Which keys a query may see.

    ``causal``: none after itself. ``window_tokens`` w > 0: none further than w - 1 tokens away. ``key_mask`` [B, S]: none where it is False.
    ``segments`` [B, S], numbers of the documents that are packed into a row: none of another document. ``positions``: where queries [T] and keys [S]
    stand, where the queries are not those of the last T of S successive keys; none at a negative position.
    """

    causal: bool
    window_tokens: int = 0
    key_mask: Tensor | None = None
    segments: Tensor | None = None
    positions: tuple[Tensor, Tensor] | None = None

    def is_plain(self, num_queries: int, num_keys: int) -> bool:
        """Whether nothing is hidden but, with ``causal``, what comes later."""
        sees_all = self.positions is None and (not self.window_tokens or self.window_tokens >= num_keys)
        return sees_all and self.key_mask is None and (self.segments is None or num_queries == num_keys == 1)

    def allowed(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        """True where a query may see a key: [1 or B, 1, T, S]."""
        if self.positions is None:
            keys = torch.arange(num_keys, device=device)
            queries = keys[num_keys - num_queries :]
        else:
            queries, keys = self.positions
        behind = queries[:, None] - keys[None, :]
        allowed = (keys >= 0).expand_as(behind)
        if self.causal:
            allowed = allowed & (behind >= 0)
        if self.window_tokens:
            allowed = allowed & (behind.abs() < self.window_tokens)
        allowed = allowed[None, None]
        if self.key_mask is not None:
            allowed = allowed & self.key_mask[:, None, None, :]
        if self.segments is not None:
            documents = self.segments[:, num_keys - num_queries :]
            allowed = allowed & (documents[:, None, :, None] == self.segments[:, None, None, :])
        return allowed


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An attention call without its tensors: what a backend must know to say whether it can serve it."""

    device: str
    dtype: str
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_queries: int
    num_keys: int
    causal: bool
    key_extension_dim: int = 0
    rotated_dims: int = 0
    window_tokens: int = 0
    shares_value: bool = False
    has_key_mask: bool = False
    has_segments: bool = False
    has_bias: bool = False
    needs_gradient: bool = False
    needs_weights: bool = False


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """softmax(scale · [q_1 ; q_2][R(s ⊙ k) ; r]ᵀ + bias) v over the keys that ``mask`` allows; a query that may see none gets 0.

    ``query`` [B, H, T, D + d_r]; ``key`` and ``value`` [B, G, S, D], the very same tensor where V is proportional to K, so that a backend can read
    it once; ``key_scale`` [D], s; ``key_extension`` [B, 1, S, d_r], r; ``key_rotation``, R, turns keys (not the extension, not values) when they are read;
    ``bias`` is broadcastable to [B, H, T, S]. A list ``weights`` is given the softmax itself, [B, H, T, S].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask
    scale: float
    key_scale: Tensor | None = None
    key_extension: Tensor | None = None
    key_rotation: Rotation | None = None
    bias: Tensor | None = None
    weights: list[Tensor] | None = None

    @property
    def shares_value(self) -> bool:
        """Whether one tensor is key and value."""
        return self.key is self.value

    @property
    def whole_key(self) -> Tensor:
        """R(s ⊙ k) [B, G, S, D], for backends that make it; the key itself where nothing is done to it."""
        key = self.key if self.key_scale is None else self.key * self.key_scale
        return key if self.key_rotation is None else self.key_rotation.turn(key)

    @property
    def problem(self) -> Problem:
        """The same without tensors."""
        batch_key = self.key.shape
        return Problem(
            device=self.query.device.type,
            dtype=str(self.query.dtype).removeprefix("torch."),
            num_attention_heads=self.query.shape[1],
            num_key_value_heads=batch_key[1],
            head_dim=batch_key[3],
            num_queries=self.query.shape[2],
            num_keys=batch_key[2],
            causal=self.mask.causal,
            key_extension_dim=0 if self.key_extension is None else self.key_extension.shape[3],
            rotated_dims=0 if self.key_rotation is None else 2 * self.key_rotation.cosine.shape[-1],
            window_tokens=self.mask.window_tokens,
            shares_value=self.shares_value,
            has_key_mask=self.mask.key_mask is not None,
            has_segments=self.mask.segments is not None,
            has_bias=self.bias is not None,
            needs_gradient=torch.is_grad_enabled() and (self.query.requires_grad or self.key.requires_grad),
            needs_weights=self.weights is not None,
        )
