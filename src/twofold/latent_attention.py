"""Multi-head latent attention (MLA): keys and values of all heads are linear in one latent, and only the latent is cached.

With the latent c = norm(x W_C) of L floats, head h has the key K_h = [c W_K,h ; r], r being the rotary key that all heads share, and the value
V_h = c W_V,h. Two ways to compute it are one function:

*expanded*  keys and values are made, and attention is that of every other layer. This is cheaper for many tokens at once: training, a prompt.
*absorbed*  q_h · (c W_K,h) = (q_h W_K,hᵀ) · c, and Σ a (c W_V,h) = (Σ a c) W_V,h: queries are taken to the latent and the outputs back from it, so that
            the cache is read once, as key and value, and nothing is made of it. This is cheaper for one token after many.

W_K and W_V have no biases: one of K adds the same to all of a query's logits, one of V is W_O's bias times a matrix.

Source: DeepSeek-V2 (2405.04434), section 2.1, equations 9 to 19, without the latent of queries.

Shapes: B batch, T new tokens, S keys, C hidden_size, H query heads, D head_dim, L latent_dim, d_r length of the shared rotary key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from twofold.attention import Attention, StreamCache, problem_of
from twofold.kernels import Problem, Rotation
from twofold.kernels.codes import Held, floats_of
from twofold.rotations import Positions
from twofold.spec import AttentionSpec

__all__ = ["LatentAttention", "attention_layer", "decoding_problem"]

Made = TypeVar("Made")


def attention_layer(spec: AttentionSpec, *, backend: str = "auto") -> Attention:
    """The module of any spec."""
    return (LatentAttention if spec.latent_dim else Attention)(spec, backend=backend)


class LatentAttention(Attention):
    """Weights: ``q_proj`` [H·D, C], ``latent_proj`` [L, C], ``latent_norm`` [L], ``k_proj`` and ``v_proj`` [H·D, L], and ``o_proj``.

    >>> from twofold.tie import Tie
    >>> spec = AttentionSpec(
    ...     tie=Tie.parse("(Q, K, V)"), hidden_size=8, num_attention_heads=4, num_key_value_heads=4, head_dim=2, causal=True, latent_dim=3
    ... )
    >>> {name: tuple(weight.shape) for name, weight in LatentAttention(spec).named_parameters() if "q" not in name}
    {'k_proj.weight': (8, 3), 'v_proj.weight': (8, 3), 'o_proj.weight': (8, 8), 'latent_proj.weight': (3, 8), 'latent_norm.weight': (3,)}
    """

    def __init__(self, spec: AttentionSpec, *, backend: str = "auto") -> None:
        super().__init__(spec, backend=backend)
        columns = spec.num_attention_heads * spec.head_dim
        self.latent_proj = nn.Linear(spec.hidden_size, spec.latent_dim, bias=spec.use_bias)
        self.latent_norm = nn.RMSNorm(spec.latent_dim, eps=spec.norm_eps)
        self.k_proj = nn.Linear(spec.latent_dim, columns, bias=False)
        self.v_proj = nn.Linear(spec.latent_dim, columns, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        key_mask: Tensor | None = None,
        segments: Tensor | None = None,
        cache: StreamCache | None = None,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        """See :meth:`Attention.forward`. A cache is given one latent [B, 1, T, L], and the shared rotary key."""
        if cache is not None and not self._absorbs(hidden_states.shape[1]):
            cache = _Expanded(cache, self._expand)
        return super().forward(hidden_states, key_mask=key_mask, segments=segments, cache=cache, weights=weights)

    def _absorbs(self, num_tokens: int) -> bool:
        """Whether so many tokens are decoded in the latent; in a compiled graph all are, since their number is not to be looked at there."""
        # What has taken the place of a projection (an adapter, codes in few bits) is more than its matrix, and is called.
        is_plain = type(self.k_proj) is nn.Linear and type(self.v_proj) is nn.Linear
        return is_plain and (torch.compiler.is_compiling() or num_tokens == 1)

    def _expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [B, H, S, D] of latents [B, 1, S, L]."""
        return self._by_head(self.k_proj(latent[:, 0])), self._by_head(self.v_proj(latent[:, 0]))

    def _by_head(self, x: Tensor) -> Tensor:
        """[B, T, H·D] -> [B, H, T, D], without a copy."""
        return x.unflatten(2, (self.spec.num_attention_heads, -1)).transpose(1, 2)

    def _matrices(self, projection: nn.Module) -> Tensor:
        """W_K or W_V, head by head: [H, D, L]."""
        weight = projection.weight
        assert isinstance(weight, Tensor)
        return weight.unflatten(0, (self.spec.num_attention_heads, -1))

    def _project(
        self, hidden_states: Tensor, queries: Positions, cache: StreamCache | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The query [B, H, T, D + d_r], or where it is absorbed [B, H, T, L + d_r], and the streams of the T tokens."""
        query = self._by_head(self.get_submodule("q_proj")(hidden_states))
        latent = self.latent_norm(self.latent_proj(hidden_states))[:, None]
        if cache is not None and not isinstance(cache, _Expanded):
            query = query @ self._matrices(self.k_proj)
        streams: tuple[Tensor, ...] = self._expand(latent) if cache is None else (latent,)
        if self.spec.positions.key_extension_dim:
            turn = self._extension_rotation(queries, latent, cache).turn
            query = torch.cat((query, turn(self._by_head(self.q_rotary_proj(hidden_states)))), dim=-1)
            streams = (*streams, turn(self.k_rotary_proj(hidden_states)[:, None]))
        return query, streams

    def _read(
        self, streams: tuple[Held, ...], keys: Positions, cache: StreamCache | None
    ) -> tuple[Held, Held, Rotation | None]:
        """K and V [B, H, S, D]; where they are absorbed, the latent [B, 1, S, L] as both."""
        if cache is None or isinstance(cache, _Expanded):
            return super()._read(streams, keys, cache)
        return streams[0], streams[0], None

    def _finish(self, output: Tensor, queries: Positions, cache: StreamCache | None) -> Tensor:
        """[B, H, T, D], or where it is absorbed [B, H, T, L], -> [B, T, H·D]."""
        if cache is not None and not isinstance(cache, _Expanded):
            output = output @ self._matrices(self.v_proj).transpose(1, 2)
        return super()._finish(output, queries, cache)

    def extra_repr(self) -> str:
        """The latent too, for ``print(model)``."""
        return f"{super().extra_repr()}, latent_dim={self.spec.latent_dim}"


class _Expanded:
    """A layer's cache that holds latents and gives keys and values."""

    def __init__(self, cache: StreamCache, expand: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self.cache = cache
        self.expand = expand

    @property
    def tokens_seen(self) -> int | Tensor:
        return self.cache.tokens_seen

    @property
    def max_tokens(self) -> int:
        return self.cache.max_tokens

    def update(self, streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        latent, *others = map(floats_of, self.cache.update(streams))
        return (*self.expand(latent), *others)

    def key_positions(self, num_keys: int) -> Positions:
        return self.cache.key_positions(num_keys)

    def remember(self, name: str, make: Callable[[], Made]) -> Made:
        return self.cache.remember(name, make)


def decoding_problem(spec: AttentionSpec, *, device: str, dtype: str, num_keys: int, codes: bool = False) -> Problem:
    """What a layer poses to a kernel for one token after others, without tensors; see :func:`~twofold.attention.problem_of`."""
    problem = problem_of(spec, device=device, dtype=dtype, num_queries=1, num_keys=num_keys, codes=codes)
    if not spec.latent_dim:
        return problem
    return replace(problem, num_key_value_heads=1, head_dim=spec.latent_dim, shares_value=True)
