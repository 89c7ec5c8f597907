"""Position schemes as values: what they refuse, how they are written, and the formulas that are theirs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention_strategies import POSITIONS
from twofold.attention import Attention
from twofold.cost import attention_parameters, cached_floats_per_layer
from twofold.errors import TwofoldError
from twofold.positions import (
    LearnedPositions,
    RelativeBiasPositions,
    RotaryPositions,
    SharedRotaryPositions,
    positions_from_dict,
    positions_to_dict,
)
from twofold.spec import AttentionSpec
from twofold.tie import Tie


@pytest.mark.parametrize("name", POSITIONS)
def test_a_scheme_is_written_and_read_without_loss(name: str):
    assert positions_from_dict(positions_to_dict(POSITIONS[name])) == POSITIONS[name]


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: positions_from_dict({"kind": "rotory"}), "rotory"),
        (lambda: positions_from_dict({}), "not known"),
        (lambda: positions_from_dict({"kind": "learned"}), "length"),
        (lambda: LearnedPositions(length=0), "at least 1"),
        (lambda: RotaryPositions(fraction=0.0), "fraction is 0.0"),
        (lambda: RotaryPositions(theta=-1.0), "theta"),
        (lambda: RotaryPositions(rotate="write"), "'write'"),
        (lambda: SharedRotaryPositions(dim=3), "even number"),
        (lambda: SharedRotaryPositions(dim=4, theta=0.0), "theta"),
        (lambda: RelativeBiasPositions(num_buckets=6), "multiple of 4"),
        (lambda: RelativeBiasPositions(num_buckets=32, max_distance=16), "max_distance"),
    ],
)
def test_mistakes(make, names: str):
    with pytest.raises(TwofoldError, match=names):
        make()


@given(st.integers(0, 200), st.integers(0, 200))
def test_a_turned_product_depends_on_the_distance_alone(first: int, second: int):
    generator = torch.Generator().manual_seed(first * 201 + second)
    query, key = torch.randn(2, 8, dtype=torch.float64, generator=generator)
    scheme = RotaryPositions(theta=50.0, fraction=0.5, proportional=True)

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        angles, distance = scheme.angles(torch.tensor([position]), head_dim=8)
        result = x.clone()
        for pair, angle in enumerate(angles[0]):
            a, b = x[pair], x[pair + distance]
            result[pair] = a * angle.cos() - b * angle.sin()
            result[pair + distance] = b * angle.cos() + a * angle.sin()
        return result

    shift = min(first, second)
    here = turned(query, first) @ turned(key, second)
    there = turned(query, first - shift) @ turned(key, second - shift)
    torch.testing.assert_close(here, there)


def test_proportional_keeps_the_frequencies_of_a_full_rotation():
    """Gemma 4: 128 of 512 dimensions turn, in pairs (i, i + 256), with the 64 fastest of 256 frequencies."""
    at = torch.arange(3)
    full, _ = RotaryPositions(theta=1e6).angles(at, head_dim=512)
    part, distance = RotaryPositions(theta=1e6, fraction=0.25, proportional=True).angles(at, head_dim=512)
    assert distance == 256
    assert torch.equal(part, full[:, :64])


@pytest.mark.parametrize("causal", [True, False])
def test_buckets_are_transformers_own(causal: bool):
    from transformers.models.t5.modeling_t5 import T5Attention

    places = torch.arange(400)
    found = RelativeBiasPositions(num_buckets=32, max_distance=128).buckets(places, places, causal=causal)
    wanted = T5Attention._relative_position_bucket(
        places[None, :] - places[:, None], bidirectional=not causal, num_buckets=32, max_distance=128
    )
    assert torch.equal(found, wanted)


def test_gta_is_a_shared_rotary_key_and_half_of_the_stream():
    """K = [first half of t ; shared rotary key of D / 2] and V = t cache G·D + D / 2 floats (2505.21487), and scale by 1/√D."""
    spec = AttentionSpec(
        tie=Tie.parse("(Q, K=V)"),
        hidden_size=32,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        causal=True,
        positions=SharedRotaryPositions(dim=8, key_dim=8),
    )
    assert cached_floats_per_layer(spec) == 4 * 16 + 8
    assert spec.scale == 16**-0.5
    shapes = {name: tuple(weight.shape) for name, weight in Attention(spec).named_parameters()}
    assert shapes["q_proj.weight"] == shapes["q_rotary_proj.weight"] == (8 * 8, 32)
    assert shapes["k_proj.weight"] == (4 * 16, 32)
    assert attention_parameters(spec) == sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize(
    ("tie", "key_dim", "told"),
    [
        ("(Q, K, V)", 4, "key_dim leaves dimensions to the value alone"),
        ("(Q=K=V)", 4, "ties Q with K or V, so their heads are of one length: drop key_dim"),
        ("(Q, K=V)", 17, "key_dim is 17, but a head has 16 dimensions"),
    ],
)
def test_what_a_cut_key_needs(tie: str, key_dim: int, told: str):
    with pytest.raises(TwofoldError, match=told):
        AttentionSpec(
            tie=Tie.parse(tie),
            hidden_size=8,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            causal=True,
            positions=SharedRotaryPositions(dim=4, key_dim=key_dim),
        )
