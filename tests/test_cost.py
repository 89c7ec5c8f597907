"""Costs against reality: parameters are those of the real model, operations those that PyTorch counts, bytes those of the real cache."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofold.cost import (
    DTYPE_BYTES,
    attention_parameters,
    cache_bytes,
    cached_bytes_per_token,
    cached_floats_per_layer,
    cached_floats_per_token,
    decode_flops_per_token,
    training_flops_per_token,
)
from twofold.errors import TwofoldError
from twofold.positions import (
    LearnedPositions,
    NoPositions,
    RelativeBiasPositions,
    RotaryPositions,
    SharedRotaryPositions,
)
from twofold.spec import AttentionSpec, ModelSpec
from twofold.tie import Tie, TiePattern

TUPLES = ["(Q, K, V)", "(Q=K, V)", "(Q, K=V)", "(Q=V, K)", "(Q=K=V)", "V = Q - K", "3*(Q, K, V) | (Q, K=V)", "V = 2K"]


@st.composite
def models(draw: st.DrawFn) -> ModelSpec:
    """Any model of any architecture; sizes are distinct primes where they can be."""
    architecture = draw(st.sampled_from(["causal_lm", "token_classification", "image_classification"]))
    causal = architecture == "causal_lm" or draw(st.booleans())
    tie = draw(st.sampled_from(TUPLES if causal else [*TUPLES, "(Q=K, V)+", "(Q=K=V)+"]))
    groups = draw(st.sampled_from([1, 3]))
    needs_equal = any(part.needs_equal_heads for part in TiePattern.parse(tie).ties)
    positions = [
        NoPositions(),
        LearnedPositions(length=10 if architecture == "image_classification" else 17),
        RotaryPositions(),
        RotaryPositions(fraction=0.5),
        SharedRotaryPositions(dim=6),
        RelativeBiasPositions(num_buckets=8, max_distance=19),
    ]
    scheme = draw(st.sampled_from(positions))
    latent = draw(st.sampled_from([0, 0, 14])) if not scheme.turns_heads else 0
    if latent:
        tie, needs_equal = "(Q, K, V)", True
    inputs = {"vocab_size": 37} if architecture == "causal_lm" or draw(st.booleans()) else {"feature_size": 41}
    if architecture == "image_classification":
        inputs = {"image_size": 15, "patch_size": 5, "num_channels": 3}
    return ModelSpec(
        tie=tie,
        architecture=architecture,
        hidden_size=draw(st.sampled_from([23, 29])),
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3 if needs_equal else groups,
        head_dim=draw(st.sampled_from([8, 12])),
        intermediate_size=31,
        positions=scheme,
        num_labels=0 if architecture == "causal_lm" else 13,
        causal=causal,
        norm=draw(st.sampled_from(["layernorm", "rmsnorm"])),
        gated_mlp=draw(st.booleans()),
        use_bias=draw(st.booleans()),
        qk_norm=not latent and draw(st.booleans()),
        latent_dim=latent,
        window_tokens=draw(st.sampled_from([(0,), (5,), (7, 0)])),
        tie_word_embeddings=draw(st.booleans()),
        **inputs,
    )


ATTENTION = AttentionSpec(
    tie=Tie.parse("(Q, K, V)"), hidden_size=23, num_attention_heads=6, num_key_value_heads=2, head_dim=5, causal=True
)
LANGUAGE = ModelSpec(
    tie="(Q, K=V)",
    architecture="causal_lm",
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    intermediate_size=31,
    vocab_size=37,
    window_tokens=(0, 5),
)


def test_one_layer_by_hand():
    assert attention_parameters(ATTENTION) == 23 * 30 + 2 * 23 * 10 + 30 * 23
    assert attention_parameters(replace(ATTENTION, tie=Tie.parse("(Q, K=V)"))) == 23 * 30 + 23 * 10 + 30 * 23
    assert attention_parameters(replace(ATTENTION, use_bias=True)) - attention_parameters(ATTENTION) == 30 + 20 + 23
    shared = replace(ATTENTION, positions=SharedRotaryPositions(dim=4))
    assert attention_parameters(shared) - attention_parameters(ATTENTION) == 23 * 6 * 4 + 23 * 4
    assert attention_parameters(replace(ATTENTION, qk_norm=True)) - attention_parameters(ATTENTION) == 2 * 5


def test_the_cache_by_hand():
    assert cached_floats_per_layer(ATTENTION) == 2 * 2 * 5
    assert cached_floats_per_layer(replace(ATTENTION, tie=Tie.parse("3V = -2K"))) == 2 * 5
    assert cached_floats_per_layer(replace(ATTENTION, positions=SharedRotaryPositions(dim=4))) == 2 * 2 * 5 + 4
    assert cached_floats_per_token(LANGUAGE) == 2 * 2 * 6
    assert cached_bytes_per_token(LANGUAGE, "fp32") == 4 * 24
    assert cache_bytes(LANGUAGE, 3, "fp32", batch=7) == 7 * 3 * 24 * 4
    # The second layer keeps no more than its window of 5.
    assert cache_bytes(LANGUAGE, 11, "bf16") == 2 * 12 * (11 + 5)
    assert cache_bytes(LANGUAGE, 0) == 0


@given(models(), st.integers(1, 50))
def test_a_cache_grows_by_the_cached_floats_until_the_windows_are_full(spec: ModelSpec, tokens: int):
    grown = cache_bytes(spec, tokens + 1, "fp64") - cache_bytes(spec, tokens, "fp64")
    assert 0 <= grown <= 8 * cached_floats_per_token(spec)
    if not any(spec.window_tokens):
        assert grown == 8 * cached_floats_per_token(spec)


def test_operations_by_hand():
    one_layer = LANGUAGE.with_changes(num_hidden_layers=1, window_tokens=(0,), gated_mlp=False)
    weights = 24 * 24 + 24 * 12 + 24 * 24 + 2 * 24 * 31 + 24 * 37
    assert decode_flops_per_token(one_layer, 11) == 2 * weights + 2 * 4 * 2 * 6 * 11
    # Positions 1 to 11 see 1 to 11 keys: 6 on average.
    assert training_flops_per_token(one_layer, 11) == 3 * (2 * weights + 2 * 4 * 2 * 6 * 6)
    windowed = one_layer.with_changes(window_tokens=(3,))
    assert training_flops_per_token(windowed, 11) == pytest.approx(
        3 * (2 * weights + 2 * 4 * 2 * 6 * (1 + 2 + 9 * 3) / 11)
    )
    assert decode_flops_per_token(windowed, 11) == 2 * weights + 2 * 4 * 2 * 6 * 3


@given(models(), st.integers(1, 30))
def test_training_costs_three_forwards_of_what_is_visible(spec: ModelSpec, context: int):
    whole = training_flops_per_token(spec, context)
    assert whole > 0
    if spec.causal and spec.architecture == "causal_lm" and not spec.latent_dim:
        mean = sum(decode_flops_per_token(spec, position) for position in range(1, context + 1)) / context
        assert whole == pytest.approx(3 * mean)


def test_mistakes():
    with pytest.raises(TwofoldError, match="fp8"):
        cached_bytes_per_token(LANGUAGE, "int3")
    with pytest.raises(TwofoldError, match="0 or more tokens"):
        cache_bytes(LANGUAGE, -1)
    with pytest.raises(TwofoldError, match="at least 1"):
        training_flops_per_token(LANGUAGE, 0)
    with pytest.raises(TwofoldError, match="not causal"):
        decode_flops_per_token(
            LANGUAGE.with_changes(architecture="token_classification", causal=False, num_labels=3), 1
        )


def test_bytes_of_each_dtype():
    assert list(DTYPE_BYTES) == ["fp64", "fp32", "bf16", "fp16", "fp8"]
    assert [cached_bytes_per_token(LANGUAGE, dtype) // cached_floats_per_token(LANGUAGE) for dtype in DTYPE_BYTES] == [
        8,
        4,
        2,
        2,
        1,
    ]


def test_costs_load_no_torch():
    check = "import sys, twofold.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
