"""Hypothesis strategies for attention layers: any tie, any heads, any positions, any mask, any backend; sizes are small and odd."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from twofold.attention import Attention
from twofold.errors import TwofoldError
from twofold.latent_attention import attention_layer
from twofold.positions import (
    LearnedPositions,
    NoPositions,
    PositionScheme,
    RelativeBiasPositions,
    RotaryPositions,
    SharedRotaryPositions,
)
from twofold.spec import AttentionSpec
from twofold.tie import Tie

EXACT_BACKENDS = ("sdpa", "reference", "folded")
"""Those that compute in float64 too, as all tests against the oracle do."""

POSITIONS: dict[str, PositionScheme] = {
    "none": NoPositions(),
    "learned": LearnedPositions(length=100),
    "rotary": RotaryPositions(theta=100.0),
    "partial": RotaryPositions(theta=100.0, fraction=0.5),
    "proportional": RotaryPositions(theta=100.0, fraction=0.25, proportional=True),
    "stream": RotaryPositions(theta=100.0, rotate="stream"),
    "partial stream": RotaryPositions(theta=100.0, fraction=0.5, rotate="stream"),
    "shared": SharedRotaryPositions(dim=6, theta=100.0),
    "gta": SharedRotaryPositions(dim=4, key_dim=4, theta=100.0),
    "bias": RelativeBiasPositions(num_buckets=8, max_distance=11),
}

NAMED_TIES = [
    Tie.parse(text) for text in ("(Q, K, V)", "(Q=K, V)", "(Q, K=V)", "(Q=K=V)", "(Q=V, K)", "V = Q - K", "2V = -3K")
]


UNTIED = Tie.parse("(Q, K, V)")


@st.composite
def random_ties(draw: st.DrawFn) -> Tie:
    """Any tie at all: one or two equations with small whole numbers, so long as no role is zero."""
    small = st.integers(-3, 3)
    rows = draw(st.lists(st.tuples(small, small, small).filter(any), min_size=1, max_size=2))
    try:
        return Tie.from_equations(rows)
    except TwofoldError:
        assume(False)
        raise


def ties() -> st.SearchStrategy[Tie]:
    return st.one_of(st.sampled_from(NAMED_TIES), random_ties())


def serves(scheme: PositionScheme, tie: Tie) -> bool:
    """Whether a tie can have these positions: some need one stream for K and V, and some a query of its own length."""
    cuts_keys = scheme.compared_dims(8) < 8
    return not (scheme.turns_stream or cuts_keys) or (
        tie.value_over_key is not None and not (cuts_keys and tie.needs_equal_heads)
    )


def ties_for(scheme: PositionScheme) -> st.SearchStrategy[Tie]:
    """Any tie that can have these positions."""
    multiples = [Tie.parse(text) for text in ("(Q, K=V)", "V = -K", "2V = -3K")]
    if scheme.compared_dims(8) < 8:
        return st.sampled_from(multiples)
    return ties().filter(lambda tie: serves(scheme, tie))


def has_latent(scheme: PositionScheme) -> bool:
    """Whether a layer with these positions can have a latent."""
    return not scheme.turns_heads and serves(scheme, UNTIED)


@st.composite
def specs(
    draw: st.DrawFn, *, causal: bool | None = None, positions: str | None = None, latent: bool | None = None
) -> AttentionSpec:
    """``latent`` None: sometimes one, where the positions allow it."""
    names = sorted(POSITIONS) if not latent else [name for name in sorted(POSITIONS) if has_latent(POSITIONS[name])]
    scheme = POSITIONS[positions or draw(st.sampled_from(names))]
    is_causal = draw(st.booleans()) if causal is None else causal
    if latent or (latent is None and has_latent(scheme) and draw(st.integers(0, 3)) == 0):
        return draw(latent_specs(scheme, causal=is_causal))
    tie = draw(ties_for(scheme))
    if not is_causal and draw(st.booleans()):
        with contextlib.suppress(TwofoldError):
            tie = replace(tie, plus=True)
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    group = 1 if tie.needs_equal_heads else draw(st.sampled_from([1, 2, 3]))
    return AttentionSpec(
        tie=tie,
        hidden_size=draw(st.sampled_from([5, 11])),
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 16])),
        causal=is_causal,
        positions=scheme,
        qk_norm=draw(st.booleans()),
        use_bias=draw(st.booleans()),
        window_tokens=draw(st.sampled_from([0, 0, 1, 3, 50])),
        plus_channels=draw(st.sampled_from([2, 10])),
    )


@st.composite
def latent_specs(draw: st.DrawFn, scheme: PositionScheme, *, causal: bool) -> AttentionSpec:
    heads = draw(st.sampled_from([1, 2, 3]))
    return AttentionSpec(
        tie=UNTIED,
        hidden_size=draw(st.sampled_from([5, 11])),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=draw(st.sampled_from([8, 16])),
        causal=causal,
        positions=scheme,
        use_bias=draw(st.booleans()),
        window_tokens=draw(st.sampled_from([0, 0, 1, 3, 50])),
        latent_dim=draw(st.sampled_from([1, 7, 8, 24])),
    )


@dataclass(frozen=True)
class Case:
    """A layer with float64 weights, and what it reads."""

    layer: Attention
    hidden_states: Tensor
    key_mask: Tensor | None
    segments: Tensor | None


def drawn_layer(spec: AttentionSpec, generator: torch.Generator, backend: str = "auto") -> Attention:
    layer = attention_layer(spec, backend=backend).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.6)
    return layer


@st.composite
def cases(draw: st.DrawFn, *, backend: str = "auto", positions: str | None = None, latent: bool | None = None) -> Case:
    spec = draw(specs(positions=positions, latent=latent))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, tokens = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 7, 13]))
    layer = drawn_layer(spec, generator, backend)
    states = torch.randn(batch, tokens, spec.hidden_size, generator=generator, dtype=torch.float64)
    key_mask = segments = None
    if draw(st.booleans()):
        key_mask = torch.rand(batch, tokens, generator=generator) < draw(st.sampled_from([0.2, 0.7]))
    if draw(st.booleans()):
        segments = (torch.rand(batch, tokens, generator=generator) < 0.3).long().cumsum(dim=1)
    return Case(layer, states, key_mask, segments)
