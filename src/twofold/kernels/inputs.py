"""What every backend is given: tensors, a mask said in words, and how keys turn when they are read.

Shapes: B batch, T queries, S keys, H query heads, G KV heads, D head_dim, d_r length of the key that all heads share. Query head h reads KV
head h // (H / G). The T queries are those of the last T of the S keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from twofold.kernels.codes import scaled


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Turns dimension i with dimension i + ``distance`` for i < n.

    ``cosine`` and ``sine`` are [S, n], one row per position, or [B, 1, S, n] where the texts of a batch stand at positions of their own. ``steady``: both
    in float32, given where each row turns by the same angles more than the row before it. A kernel then needs a row of each block of keys, and not all.
    """

    cosine: Tensor
    sine: Tensor
    distance: int
    steady: tuple[Tensor, Tensor] | None = None

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
    stand, where the queries are not those of the last T of S successive keys; none at a negative position. ``lengths`` [B], whole numbers: how many of the
    S keys each sequence has, the queries being those of the last T of these; it stands in for ``positions``.
    """

    causal: bool
    window_tokens: int = 0
    key_mask: Tensor | None = None
    segments: Tensor | None = None
    positions: tuple[Tensor, Tensor] | None = None
    lengths: Tensor | None = None

    def is_plain(self, num_queries: int, num_keys: int) -> bool:
        """Whether nothing is hidden but, with ``causal``, what comes later."""
        in_a_row = self.positions is None and self.lengths is None
        sees_all = in_a_row and (not self.window_tokens or self.window_tokens >= max(num_queries, num_keys))
        return sees_all and self.key_mask is None and (self.segments is None or num_queries == num_keys == 1)

    def allowed(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        """True where a query may see a key: [1 or B, 1, T, S]."""
        queries, keys = self._places(num_queries, num_keys, device)
        behind = queries[:, :, None] - keys
        allowed = (keys >= 0).expand_as(behind)
        if self.lengths is not None:
            allowed = (keys < self.lengths[:, None, None]) & (queries >= 0)[:, :, None]
        if self.causal:
            allowed = allowed & (behind >= 0)
        if self.window_tokens:
            allowed = allowed & (behind.abs() < self.window_tokens)
        allowed = allowed[:, None]
        if self.key_mask is not None:
            allowed = allowed & self.key_mask[:, None, None, :]
        if self.segments is not None:
            documents = self.segments[:, num_keys - num_queries :]
            allowed = allowed & (documents[:, None, :, None] == self.segments[:, None, None, :])
        return allowed

    def _places(self, num_queries: int, num_keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where queries [1 or B, T] and keys [S] stand."""
        if self.positions is not None:
            queries, keys = self.positions
            return queries[None], keys
        keys, queries = torch.arange(num_keys, device=device), torch.arange(num_queries, device=device)[None]
        return queries - num_queries + (num_keys if self.lengths is None else self.lengths[:, None]), keys


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An attention call without its tensors: what a backend must know to say whether it can serve it."""

    device: str
    dtype: str
    key_dtype: str
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
    has_positions: bool = False
    has_lengths: bool = False
    has_pages: bool = False
    has_scales: bool = False
    has_sinks: bool = False
    has_bias: bool = False
    soft_cap: float = 0.0
    needs_gradient: bool = False
    needs_weights: bool = False

    @property
    def is_longer_than_keys(self) -> bool:
        """Whether the first queries would stand before the text: a long text reads a short source."""
        return self.num_queries > self.num_keys and not (self.has_positions or self.has_lengths)

    @property
    def beyond_pytorch(self) -> str:
        """What of it no chain of PyTorch's fused calls can say; empty: nothing. Codes are no more than floats to be made of them first."""
        reasons = {
            "soft_cap": self.soft_cap,
            "sinks": self.has_sinks,
            "pages": self.has_pages,
        }
        return ", ".join(reason for reason, given in reasons.items() if given)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """softmax(cap(scale · [q_1 ; q_2][R(s ⊙ k) ; r]ᵀ) + bias) v over the keys that ``mask`` allows; a query that may see none gets 0.

    ``query`` [B, H, T, D + d_r]; ``key`` and ``value`` [B, G, S, D], the very same tensor where V is proportional to K, so that a backend can read
    it once; ``key_scale`` [D], s; ``key_extension`` [B, 1, S, d_r], r; ``key_rotation``, R, turns keys (not the extension, not values) when they are read;
    ``bias`` is broadcastable to [B, H, T, S]. A list ``weights`` is given the softmax itself, [B, H, T, S].

    ``soft_cap`` c > 0 is cap(x) = c · tanh(x / c). ``sinks`` [H] are logits of a key that every query sees and whose value is 0. Where keys are held in fewer
    bits, ``key_scales`` is what they are multiplied by as they are read, [B, G, S, 1] or [B, G, 1, D] (1 may stand for B and G); ``value_scales`` likewise, the very
    same tensor where the value is. ``pages`` [B, P], whole numbers: keys and values lie in pages, [N, G, tokens of a page, D], those of sequence b being
    pages[b] one after the other, S = P · tokens of a page; per-token scales lie in the same pages, [N, G, tokens of a page, 1]. It goes with ``mask.lengths``.
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
    soft_cap: float = 0.0
    sinks: Tensor | None = None
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    pages: Tensor | None = None

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
    def num_keys(self) -> int:
        """S."""
        return self.key.shape[2] * (1 if self.pages is None else self.pages.shape[1])

    @property
    def plain(self) -> Inputs:
        """The same with keys and values as they are meant: in a row, and in the dtype of the query."""
        if self.pages is None and self.key.dtype == self.query.dtype and self.key_scales is None:
            return self
        key = self._meant(self.key, self.key_scales)
        value = key if self.shares_value else self._meant(self.value, self.value_scales)
        return replace(self, key=key, value=value, key_scales=None, value_scales=None, pages=None)

    def _meant(self, held: Tensor, scales: Tensor | None) -> Tensor:
        numbers, dtype = self._in_a_row(held), self.query.dtype
        if scales is None:
            return numbers.to(dtype)
        is_per_token = scales.shape[3] == 1
        return scaled(numbers, self._in_a_row(scales) if is_per_token else scales, dtype)

    def _in_a_row(self, held: Tensor) -> Tensor:
        """[N, G, tokens of a page, D] -> [B, G, S, D]; what lies in no pages as it is."""
        return held if self.pages is None else held[self.pages].transpose(1, 2).flatten(2, 3)

    @property
    def _floats(self) -> tuple[Tensor | None, ...]:
        """All that may have a gradient."""
        tables = () if self.key_rotation is None else (self.key_rotation.cosine, self.key_rotation.sine)
        scales = (self.key_scale, self.key_scales, self.value_scales)
        return (self.query, self.key, self.value, self.key_extension, self.bias, self.sinks, *scales, *tables)

    @property
    def problem(self) -> Problem:
        """The same without tensors."""
        batch_key = self.key.shape
        return Problem(
            device=self.query.device.type,
            dtype=str(self.query.dtype).removeprefix("torch."),
            key_dtype=str(self.key.dtype).removeprefix("torch."),
            num_attention_heads=self.query.shape[1],
            num_key_value_heads=batch_key[1],
            head_dim=batch_key[3],
            num_queries=self.query.shape[2],
            num_keys=self.num_keys,
            causal=self.mask.causal,
            key_extension_dim=0 if self.key_extension is None else self.key_extension.shape[3],
            rotated_dims=0 if self.key_rotation is None else 2 * self.key_rotation.cosine.shape[-1],
            window_tokens=self.mask.window_tokens,
            shares_value=self.shares_value,
            has_key_mask=self.mask.key_mask is not None,
            has_segments=self.mask.segments is not None,
            has_positions=self.mask.positions is not None,
            has_lengths=self.mask.lengths is not None,
            has_pages=self.pages is not None,
            has_scales=self.key_scales is not None,
            has_sinks=self.sinks is not None,
            has_bias=self.bias is not None,
            soft_cap=self.soft_cap,
            needs_gradient=torch.is_grad_enabled()
            and any(one is not None and one.requires_grad for one in self._floats),
            needs_weights=self.weights is not None,
        )
