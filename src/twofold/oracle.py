"""The oracle: one attention layer as it is written on paper, head by head and without a shortcut, in float64 if it is given float64.

It shares no code with :mod:`twofold.attention`, the kernels, or the tensor functions of the positions; the tests hold all of them to it. It takes
the layer's weights by name and nothing else, so that what it computes is a function of the spec.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from twofold.positions import RelativeBiasPositions, RotaryPositions, SharedRotaryPositions
from twofold.spec import AttentionSpec
from twofold.tie import ROLES

__all__ = ["layer"]


def layer(
    spec: AttentionSpec,
    weights: Mapping[str, Tensor],
    hidden_states: Tensor,
    *,
    key_mask: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """[B, T, C] -> [B, T, C]: for each head, softmax(α Q Kᵀ + positions) V, then all heads through W_O.

    ``weights`` is the ``state_dict`` of an :class:`~twofold.attention.Attention`; ``key_mask`` and ``segments`` are [B, T]. A query that may
    see no key gets 0 from every head.
    """
    batches = []
    for row, states in enumerate(hidden_states):
        allowed = _allowed(
            spec, len(states), None if key_mask is None else key_mask[row], None if segments is None else segments[row]
        )
        heads = [_head(spec, weights, states, head, allowed) for head in range(spec.num_attention_heads)]
        batches.append(_linear(weights, "o_proj", torch.cat(heads, dim=-1)))
    return torch.stack(batches)


def _head(spec: AttentionSpec, weights: Mapping[str, Tensor], states: Tensor, head: int, allowed: Tensor) -> Tensor:
    """One head of one sequence: [T, C] -> [T, D]."""
    group = head // (spec.num_attention_heads // spec.num_key_value_heads)
    positions, turned_stream = spec.positions, spec.positions.turns_stream
    query, key, value = (_role(spec, weights, states, role, head if role == "Q" else group) for role in ROLES)
    if spec.qk_norm:
        query, key = (_rms_norm(x, weights[f"{n}_norm.weight"], spec.norm_eps) for x, n in ((query, "q"), (key, "k")))
    if turned_stream:
        # The value is a multiple of the key as it stands after normalisation.
        value = float(spec.tie.value_over_key or 0) * key
    if isinstance(positions, RotaryPositions):
        query, key = _turned(positions, query, 1), _turned(positions, key, 1)
        value = _turned(positions, value, 1) if turned_stream else value
    compared = (
        positions.key_dim if isinstance(positions, SharedRotaryPositions) and positions.key_dim else spec.head_dim
    )
    logits = query @ key[:, :compared].T
    if isinstance(positions, SharedRotaryPositions):
        extension = slice(head * positions.dim, (head + 1) * positions.dim)
        whole = RotaryPositions(theta=positions.theta)
        shared_query = _turned(whole, _linear(weights, "q_rotary_proj", states)[:, extension], 1)
        shared_key = _turned(whole, _linear(weights, "k_rotary_proj", states), 1)
        logits = logits + shared_query @ shared_key.T
    logits = logits / math.sqrt(compared + positions.key_extension_dim)
    if isinstance(positions, RelativeBiasPositions):
        logits = logits + _relative_bias(positions, weights["relative_bias"][:, head], len(states), causal=spec.causal)
    if spec.tie.plus:
        logits = _plus(logits, weights["plus_weight"], weights["plus_bias"])
    shares = torch.softmax(logits.masked_fill(~allowed, -math.inf), dim=-1)
    output = torch.where(allowed.any(dim=-1, keepdim=True), shares, torch.zeros_like(shares)) @ value
    return _turned(positions, output, -1) if turned_stream and isinstance(positions, RotaryPositions) else output


def _role(spec: AttentionSpec, weights: Mapping[str, Tensor], states: Tensor, role: str, head: int) -> Tensor:
    """A role of one head, [T, D]: its row of M times the free projections."""
    dim = spec.query_dim if role == "Q" else spec.head_dim
    columns = slice(head * dim, (head + 1) * dim)
    if spec.latent_dim and role != "Q":
        latent = _rms_norm(_linear(weights, "latent_proj", states), weights["latent_norm.weight"], spec.norm_eps)
        return _linear(weights, f"{role.lower()}_proj", latent)[:, columns]
    total = states.new_zeros(len(states), dim)
    for coefficient, name in zip(spec.tie.row(role), spec.tie.free_projections, strict=True):
        if coefficient:
            total = total + float(coefficient) * _linear(weights, f"{name.lower()}_proj", states)[:, columns]
    return total


def _linear(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    product = x @ weights[f"{name}.weight"].T
    return product + weights[f"{name}.bias"] if f"{name}.bias" in weights else product


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight


def _turned(positions: RotaryPositions, x: Tensor, direction: int) -> Tensor:
    """Each pair of dimensions of x [T, D] as a complex number, times e^(±i p ω)."""
    head_dim = x.shape[-1]
    turning = round(positions.fraction * head_dim)
    base = head_dim if positions.proportional else turning
    columns = list(x.unbind(dim=-1))
    place = torch.arange(len(x), dtype=torch.float64)
    for pair in range(turning // 2):
        first, second = pair, pair + base // 2
        angle = direction * place * positions.theta ** (-2 * pair / base)
        number = torch.complex(columns[first], columns[second]) * torch.polar(torch.ones_like(angle), angle)
        columns[first], columns[second] = number.real, number.imag
    return torch.stack(columns, dim=-1)


def _relative_bias(positions: RelativeBiasPositions, numbers: Tensor, count: int, *, causal: bool) -> Tensor:
    """[T, T], pair by pair. Source: Raffel et al. 2020 (1910.10683)."""
    buckets = torch.zeros(count, count, dtype=torch.long)
    for query in range(count):
        for key in range(count):
            behind, available, first = query - key, positions.num_buckets, 0
            if not causal:
                available //= 2
                first = available if behind < 0 else 0
                behind = abs(behind)
            distance, exact = max(behind, 0), available // 2
            if distance >= exact:
                spread = math.log(distance / exact) / math.log(positions.max_distance / exact)
                distance = min(exact + int(spread * (available - exact)), available - 1)
            buckets[query, key] = first + distance
    return numbers[buckets]


def _plus(logits: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The paper's 2-D positions in full: every logit over m channels, plus [sincos(i); sincos(j)], back to one by w and b."""
    count, channels = len(logits), len(weight)
    half = channels // 2
    table = torch.zeros(count, half, dtype=torch.float64)
    for position in range(count):
        for channel in range(half):
            angle = position * 10000.0 ** (-2 * (channel // 2) / half)
            table[position, channel] = math.cos(angle) if channel % 2 else math.sin(angle)
    table = table.to(logits.dtype)
    rows = table[:, None, :].expand(count, count, half)
    columns = table[None, :, :].expand(count, count, half)
    spread = logits[..., None] + torch.cat((rows, columns), dim=-1)
    return spread @ weight + bias


def _allowed(spec: AttentionSpec, count: int, key_mask: Tensor | None, segments: Tensor | None) -> Tensor:
    """[T, T], pair by pair."""
    allowed = torch.zeros(count, count, dtype=torch.bool)
    for query in range(count):
        for key in range(count):
            seen = not (spec.causal and key > query)
            seen &= not spec.window_tokens or abs(query - key) < spec.window_tokens
            seen &= key_mask is None or bool(key_mask[key])
            seen &= segments is None or bool(segments[query] == segments[key])
            allowed[query, key] = seen
    return allowed
