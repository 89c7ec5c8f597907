"""Layouts of weights: to and fro without loss, the same function in each, and a tie that does not hold is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from attention_strategies import drawn_layer, specs
from twofold.attention import Attention
from twofold.errors import TwofoldError
from twofold.layouts import convert
from twofold.spec import AttentionSpec
from twofold.tie import Tie

LAYOUTS = ("free", "roles", "fused")


@given(
    specs(latent=False),
    st.integers(0, 2**31),
    st.permutations(LAYOUTS),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_round_trip_is_bitwise(spec: AttentionSpec, seed: int, order: list[str], dtype: torch.dtype):
    """Free projections have unit rows, so they come back as they were, whatever was derived from them in between."""
    weights = drawn_layer(spec, torch.Generator().manual_seed(seed)).to(dtype).state_dict()
    start = dict(weights)
    for source, target in zip(("free", *order), (*order, "free"), strict=True):
        weights = convert(weights, spec, source=source, target=target)
    assert weights.keys() == start.keys()
    assert all(torch.equal(weights[name], start[name]) for name in start)


@given(specs(latent=False), st.integers(0, 2**31))
def test_an_untied_layer_with_converted_weights_is_the_same_function(spec: AttentionSpec, seed: int):
    # Where the value follows the stream (turned, or normalised with it) an untied layer is another function; where a key is cut, there is none.
    assume(not spec.positions.turns_stream and spec.query_dim == spec.head_dim)
    generator = torch.Generator().manual_seed(seed)
    layer = drawn_layer(spec, generator)
    untied = Attention(replace(spec, tie=replace(Tie.parse("(Q, K, V)"), plus=spec.tie.plus))).double()
    untied.load_state_dict(convert(layer.state_dict(), spec, source="free", target="roles"))
    states = torch.randn(2, 5, spec.hidden_size, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(untied(states), layer(states), rtol=1e-10, atol=1e-10)


def tied(tie: str = "(Q, K=V)") -> AttentionSpec:
    return AttentionSpec(
        tie=Tie.parse(tie), hidden_size=5, num_attention_heads=2, num_key_value_heads=2, head_dim=3, causal=True
    )


def test_fused_rows_are_q_then_k_then_v():
    weights = drawn_layer(tied("V = Q - K"), torch.Generator().manual_seed(0)).state_dict()
    fused = convert(weights, tied("V = Q - K"), source="free", target="fused")["qkv_proj.weight"]
    q, k, v = fused.split(6)
    assert torch.equal(q, weights["q_proj.weight"])
    assert torch.equal(k, weights["k_proj.weight"])
    torch.testing.assert_close(v, q - k)


def test_names_outside_the_prefix_pass_through():
    weights = {f"layers.0.{n}": w for n, w in drawn_layer(tied(), torch.Generator()).state_dict().items()}
    weights["norm.weight"] = torch.ones(5)
    roles = convert(weights, tied(), source="free", target="roles", prefix="layers.0.")
    assert {*roles} - {*weights} == {"layers.0.v_proj.weight"}
    assert roles["norm.weight"] is weights["norm.weight"]


def test_roles_that_do_not_obey_the_tie_are_refused():
    roles = convert(drawn_layer(tied(), torch.Generator()).state_dict(), tied(), source="free", target="roles")
    roles["v_proj.weight"] = roles["v_proj.weight"] + 1e-6
    with pytest.raises(TwofoldError, match=r"do not obey \(Q, K=V\): V's weight is off by 1e-06"):
        convert(roles, tied(), source="roles", target="free")


@pytest.mark.parametrize(
    ("weights", "layouts", "names"),
    [
        ({}, ("free", "roles"), "lack q_proj.weight"),
        ({"q_proj.weight": torch.zeros(6, 4)}, ("free", "roles"), r"\(6, 4\), but this layer needs \(6, 5\)"),
        ({}, ("fussed", "roles"), "no layout 'fussed'"),
    ],
)
def test_mistakes(weights: dict[str, torch.Tensor], layouts: tuple[str, str], names: str):
    with pytest.raises(TwofoldError, match=names):
        convert(weights, tied(), source=layouts[0], target=layouts[1])
