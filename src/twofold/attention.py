"""The one attention module: tie × heads × positions × normalisation × mask, all read from a spec; there is no class per variant.

A layer has a weight for each free projection of its tie and none for the roles that follow from them. K and V reach the cache and the kernel as
*streams*: one tensor [B, G, T, D] where V = cK, two elsewhere, and the shared rotary key [B, 1, T, d_r] of layers that have one. Where one
stream serves as key and value, keys are normalised and turned when they are read; elsewhere K is cached ready to use. A cache may give a stream as
codes, which reach the kernel as codes, unless the key must be changed before.

Shapes: B batch, T new tokens, S keys, C hidden_size, H query heads, G KV heads, D head_dim, d_r length of the shared rotary key.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from twofold.errors import TwofoldError
from twofold.kernels import Inputs, Mask, Problem, Rotation, attend, check_name
from twofold.kernels.codes import Held, floats_of, numbers_of, scales_of
from twofold.rotations import Positions, Span, indices, rotation_at, rows
from twofold.spec import AttentionSpec
from twofold.tie import ROLES

__all__ = ["Attention", "StreamCache", "problem_of"]


Made = TypeVar("Made")


class StreamCache(Protocol):
    """One layer of a cache, as attention sees it."""

    @property
    def tokens_seen(self) -> int | Tensor:
        """The position of the first of the tokens that the next update brings; a tensor [] where only the device knows it."""

    @property
    def max_tokens(self) -> int:
        """The most tokens that there will ever be; 0: not known."""

    def update(self, streams: tuple[Tensor, ...]) -> tuple[Held, ...]:
        """Append the streams of T tokens; streams of S keys, among which are all that the new tokens may see."""

    def key_positions(self, num_keys: int) -> Positions:
        """Where the S keys that the last update gave stand; negative where a slot holds no key yet."""

    def remember(self, name: str, make: Callable[[], Made]) -> Made:
        """What ``make`` gives, made once where the cache's room never moves."""


class Attention(nn.Module):
    """softmax(α Q Kᵀ + positions) V W_O, with Q, K and V tied as the spec says; α = ``spec.scale``.

    Weights: ``q_proj``, ``k_proj``, ``v_proj`` for those of the roles that are free projections, and ``o_proj``. ``backend`` names a kernel
    (see :mod:`twofold.kernels`). Raises TwofoldError for an unknown backend.

    >>> from twofold.tie import Tie
    >>> spec = AttentionSpec(
    ...     tie=Tie.parse("(Q, K=V)"), hidden_size=8, num_attention_heads=4, num_key_value_heads=2, head_dim=2, causal=True
    ... )
    >>> layer = Attention(spec)
    >>> [name for name, _ in layer.named_parameters()]
    ['q_proj.weight', 'k_proj.weight', 'o_proj.weight']
    >>> layer(torch.zeros(1, 3, 8)).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, spec: AttentionSpec, *, backend: str = "auto") -> None:
        super().__init__()
        check_name(backend)
        self.spec = spec
        self.backend = backend
        width, bias, extension = spec.hidden_size, spec.use_bias, spec.positions.key_extension_dim
        for role in spec.tie.free_projections:
            self.add_module(f"{role.lower()}_proj", nn.Linear(width, spec.columns_of(role), bias=bias))
        if extension:
            self.q_rotary_proj = nn.Linear(width, spec.num_attention_heads * extension, bias=bias)
            self.k_rotary_proj = nn.Linear(width, extension, bias=bias)
        self.o_proj = nn.Linear(spec.num_attention_heads * spec.head_dim, width, bias=bias)
        if spec.qk_norm:
            self.q_norm = nn.RMSNorm(spec.query_dim, eps=spec.norm_eps)
            self.k_norm = nn.RMSNorm(spec.head_dim, eps=spec.norm_eps)
        if spec.positions.num_bias_buckets:
            shape = (spec.positions.num_bias_buckets, spec.num_attention_heads)
            self.relative_bias = nn.Parameter(torch.zeros(shape))
        if spec.tie.plus:
            self.plus_weight = nn.Parameter(torch.full((spec.plus_channels,), self._plus_start))
            self.plus_bias = nn.Parameter(torch.zeros(1))

    @property
    def _plus_start(self) -> float:
        """Weights whose sum, the temperature of the logits, is 1 at first: drawn around 0 they would leave no logits at all."""
        return 1.0 / self.spec.plus_channels

    def first_values(self, name: str) -> float | None:
        """What a bare parameter starts from; None: it is drawn."""
        return {"plus_weight": self._plus_start, "plus_bias": 0.0}.get(name)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        key_mask: Tensor | None = None,
        segments: Tensor | None = None,
        cache: StreamCache | None = None,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        """[B, T, C] -> [B, T, C].

        ``key_mask`` [B, P] is False where a token is padding; ``segments`` [B, T] numbers the documents packed into a row. With a ``cache`` the T
        tokens follow those that it has seen, and P counts those too (or all that it has room for). A list ``weights`` is given the attention
        weights [B, H, T, S], by the one backend that has them. Raises TwofoldError for shapes that do not fit.
        """
        spec = self.spec
        self._check(hidden_states, segments, cache)
        queries = keys = _positions_of(hidden_states, cache)
        _check_mask(key_mask, hidden_states.shape[0], queries, cache)
        query, new = self._project(hidden_states, queries, cache)
        streams: tuple[Held, ...] = new
        if cache is not None:
            streams = cache.update(new)
            keys = cache.key_positions(streams[0].shape[2])
        key, value, rotation = self._read(streams, keys, cache)
        extension = floats_of(streams[-1]) if spec.positions.key_extension_dim else None
        lengths, positions = _places(queries, keys, query)
        output = attend(
            Inputs(
                query=query,
                key=numbers_of(key),
                value=numbers_of(value),
                key_scales=scales_of(key),
                value_scales=scales_of(value),
                key_extension=extension,
                key_rotation=rotation,
                bias=self._bias(query, queries, keys),
                mask=Mask(
                    causal=spec.causal,
                    window_tokens=spec.window_tokens,
                    key_mask=_keys_of(key_mask, keys),
                    segments=segments,
                    positions=positions,
                    lengths=lengths,
                ),
                scale=spec.scale,
                weights=weights,
            ),
            self.backend,
        )
        return self.o_proj(self._finish(output, queries, cache))

    def _project(
        self, hidden_states: Tensor, queries: Positions, cache: StreamCache | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The query [B, H, T, D + d_r], ready, and the streams of the T tokens as they are cached."""
        spec = self.spec
        query, key, value = self._roles(hidden_states)
        rotation = self._rotation(queries, key, cache)
        if spec.qk_norm:
            query = self.q_norm(query)
        if rotation is not None:
            query = rotation.turn(query)
        streams: tuple[Tensor, ...] = (key,) if value is None else (key, value)
        if value is not None or spec.positions.turns_stream:
            key = self.k_norm(key) if spec.qk_norm else key
            streams = (key if rotation is None else rotation.turn(key), *streams[1:])
        if extension := spec.positions.key_extension_dim:
            turn = self._extension_rotation(queries, key, cache).turn
            query = torch.cat((query, turn(_heads(self.q_rotary_proj(hidden_states), extension))), dim=-1)
            streams = (*streams, turn(_heads(self.k_rotary_proj(hidden_states), extension)))
        if spec.tie.plus:
            query = query * self.plus_weight.sum()
        return query, streams

    def _roles(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Q [B, H, T, D], K and V [B, G, T, D]; no V where it is a multiple of K, and one tensor for roles that are equal."""
        tie = self.spec.tie
        free = {role: self.get_submodule(f"{role.lower()}_proj")(hidden_states) for role in tie.free_projections}
        made = {}
        for role in ROLES if tie.value_over_key is None else ROLES[:2]:
            terms = [(float(c), free[name]) for c, name in zip(tie.row(role), tie.free_projections, strict=True) if c]
            made[role] = _heads(_combination(terms), self.spec.query_dim if role == "Q" else self.spec.head_dim)
        return made["Q"], made["K"], made.get("V")

    def _read(
        self, streams: tuple[Held, ...], keys: Positions, cache: StreamCache | None
    ) -> tuple[Held, Held, Rotation | None]:
        """K and V [B, G, S, D] from what the cache gives, and the rotation that the kernel must apply to K."""
        stream, positions = streams[0], self.spec.positions
        if self.spec.tie.value_over_key is None:
            return stream, streams[1], None
        if positions.turns_stream:
            return stream, stream, None
        if not _reads_one_tensor(self.spec):
            stream = floats_of(stream)
            key = self.k_norm(stream) if self.spec.qk_norm else stream
            return key[..., : self.spec.query_dim], stream, self._rotation(keys, stream, cache)
        return stream, stream, self._rotation(keys, stream, cache)

    def _finish(self, output: Tensor, queries: Positions, cache: StreamCache | None) -> Tensor:
        """[B, H, T, D] -> [B, T, H·D]: turned back if the stream was turned, and times c where V = cK."""
        if self.spec.positions.turns_stream:
            rotation = self._rotation(queries, output, cache)
            output = output if rotation is None else rotation.turn_back(output)
        if self.spec.tie.value_over_key not in (None, 1):
            output = output * float(self.spec.tie.value_over_key or 1)
        return output.transpose(1, 2).flatten(2)

    def _bias(self, query: Tensor, queries: Positions, keys: Positions) -> Tensor | None:
        """What is added to the logits, broadcastable to [B, H, T, S].

        The 2-D positions S'ij = Sij·Σw + w·Pij + b are a temperature Σw (in the query) and one number per key: terms of i cancel in the softmax.
        """
        bias = None
        if self.spec.positions.num_bias_buckets:
            places = [indices(positions, query.device) for positions in (queries, keys)]
            buckets = self.spec.positions.buckets(*places, causal=self.spec.causal)
            bias = self.relative_bias[buckets].permute(2, 0, 1)[None].to(query.dtype)
        if self.spec.tie.plus:
            half = self.spec.plus_channels // 2
            table = _sines(len(indices(keys, query.device)), half, query.device).to(self.plus_weight.dtype)
            per_key = (table @ self.plus_weight[half:] + self.plus_bias).to(query.dtype)[None, None, None]
            bias = per_key if bias is None else bias * self.plus_weight.sum() + per_key
        return bias

    def _rotation(self, positions: Positions, like: Held, cache: StreamCache | None) -> Rotation | None:
        """The turning of queries and keys at these positions."""
        head_dim = self.spec.head_dim
        angles = partial(self.spec.positions.angles, head_dim=head_dim)
        make = partial(rotation_at, (self.spec.positions, head_dim), angles, like=like)
        return _made_for(positions, make, "rotation", cache)

    def _extension_rotation(self, positions: Positions, like: Tensor, cache: StreamCache | None) -> Rotation:
        make = partial(rotation_at, self.spec.positions, self.spec.positions.extension_angles, like=like)
        rotation = _made_for(positions, make, "extension", cache)
        assert rotation is not None
        return rotation

    def _check(self, hidden_states: Tensor, segments: Tensor | None, cache: StreamCache | None) -> None:
        if hidden_states.ndim != 3 or hidden_states.shape[2] != self.spec.hidden_size:
            raise TwofoldError(
                f"hidden_states have the shape {tuple(hidden_states.shape)}, but must be (batch, tokens, {self.spec.hidden_size})."
            )
        if cache is not None and not self.spec.causal:
            raise TwofoldError("A layer that is not causal sees later tokens and cannot decode: leave the cache out.")
        if segments is not None:
            if cache is not None and cache.tokens_seen:
                raise TwofoldError("Packed documents are read at once: segments cannot continue a cache.")
            if segments.shape != hidden_states.shape[:2]:
                raise TwofoldError(
                    f"segments have the shape {tuple(segments.shape)}, but must be (batch, tokens) = {tuple(hidden_states.shape[:2])}."
                )

    def extra_repr(self) -> str:
        """The tie and the heads, for ``print(model)``."""
        spec = self.spec
        return f"{spec.tie}, heads={spec.num_attention_heads}, kv_heads={spec.num_key_value_heads}, head_dim={spec.head_dim}"


def problem_of(
    spec: AttentionSpec, *, device: str, dtype: str, num_queries: int, num_keys: int, codes: bool = False
) -> Problem:
    """The problem that a layer poses to a kernel, without tensors: ``choose(problem)`` says which backend would serve it.

    ``codes``: its cache gives streams as codes.
    """
    shares_stream = spec.tie.value_over_key is not None
    reads_codes = codes and (not shares_stream or _reads_one_tensor(spec))
    turned = spec.positions.angles(torch.zeros(1), head_dim=spec.head_dim)
    turns_on_reading = turned is not None and shares_stream and not spec.positions.turns_stream
    return Problem(
        device=device,
        dtype=dtype,
        key_dtype="int8" if reads_codes else dtype,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.query_dim,
        num_queries=num_queries,
        num_keys=num_keys,
        causal=spec.causal,
        key_extension_dim=spec.positions.key_extension_dim,
        rotated_dims=2 * turned[0].shape[-1] if turned is not None and turns_on_reading else 0,
        window_tokens=spec.window_tokens,
        shares_value=shares_stream and _reads_one_tensor(spec),
        has_scales=reads_codes,
        has_bias=bool(spec.positions.num_bias_buckets) or spec.tie.plus,
    )


def _reads_one_tensor(spec: AttentionSpec) -> bool:
    """Whether a stream that serves as key and value is both as it is held: nothing is done to the key before the kernel has it."""
    return spec.query_dim == spec.head_dim and not (spec.qk_norm and not spec.positions.turns_stream)


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, T, heads·D] -> [B, heads, T, D], without a copy."""
    return x.unflatten(2, (-1, head_dim)).transpose(1, 2)


def _combination(terms: list[tuple[float, Tensor]]) -> Tensor:
    """Σ c·x; the tensor itself where that is one term with c = 1."""
    (first, total), *others = terms
    total = total if first == 1.0 else first * total
    for coefficient, tensor in others:
        total = torch.add(total, tensor, alpha=coefficient)
    return total


def _positions_of(hidden_states: Tensor, cache: StreamCache | None) -> Positions:
    """Where the T tokens stand."""
    first, count = 0 if cache is None else cache.tokens_seen, hidden_states.shape[1]
    if isinstance(first, Tensor):
        return first + torch.arange(count, device=hidden_states.device)
    return Span(first, first + count)


def _made_for(
    positions: Positions, make: Callable[..., Rotation | None], name: str, cache: StreamCache | None
) -> Rotation | None:
    """The rows of a table of all positions there will be, where that is known: a compiled step has it as an input."""
    if cache is None or not cache.max_tokens:
        return make(positions=positions)
    return rows(cache.remember(name, partial(make, positions=Span(0, cache.max_tokens))), positions)


def _keys_of(key_mask: Tensor | None, keys: Positions) -> Tensor | None:
    """The mask [B, S] of the keys, of that [B, P] of all tokens."""
    if key_mask is None:
        return None
    return key_mask[:, keys.clamp(min=0)] if isinstance(keys, Tensor) else key_mask[:, keys.start : keys.stop]


def _places(queries: Positions, keys: Positions, query: Tensor) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
    """How many keys there are [B], or where queries and keys stand; neither where the queries are those of the last T of S keys, as kernels take for granted.

    Of a cache's room only the first slots hold keys. Kernels that are told how many need not read the rest.
    """
    if isinstance(keys, Span):
        if isinstance(queries, Span) and queries.stop == keys.stop:
            return None, None
        if isinstance(queries, Tensor) and keys.start == 0:
            return (queries[-1] + 1).expand(len(query)), None
    return None, (indices(queries, query.device), indices(keys, query.device))


def _check_mask(key_mask: Tensor | None, batch: int, queries: Positions, cache: StreamCache | None) -> None:
    if key_mask is None:
        return
    room = 0 if cache is None else cache.max_tokens
    tokens = queries.stop if isinstance(queries, Span) else room
    if key_mask.shape[0] != batch or (key_mask.shape[1] != tokens and not 0 < room <= key_mask.shape[1]):
        raise TwofoldError(
            f"key_mask has the shape {tuple(key_mask.shape)}, but must be (batch, tokens, those in the cache included) = {(batch, tokens)}."
        )


def _sines(count: int, channels: int, device: torch.device) -> Tensor:
    """Sinusoids of positions 0 … count - 1, [count, channels] in float64: sine in even channels, cosine in odd ones.

    Source: Vaswani et al. 2017 (1706.03762), section 3.5.
    """
    index = torch.arange(channels, device=device)
    position = torch.arange(count, device=device, dtype=torch.float64)
    angles = torch.outer(position, 10000.0 ** (-(index - index % 2).double() / channels))
    return torch.where(index % 2 == 0, angles.sin(), angles.cos())
