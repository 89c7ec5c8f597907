"""Streams as codes that kernels read: what rounding costs, that one pass and token by token are the same, and that the kernels are given codes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attention_strategies import POSITIONS
from model_strategies import GPT2, LLAMA, drawn_model, drawn_tokens
from test_cache import step
from test_generation import MODELS, generated
from twofold import kernels, oracle
from twofold.attention import Attention, problem_of
from twofold.cache import LayerView, StaticTiedLayer, TiedCache, TiedLayer
from twofold.cache_spec import CacheSpec
from twofold.cost import cached_streams
from twofold.errors import TwofoldError
from twofold.kernels import Inputs, native
from twofold.kernels.codes import MAX_CODE, Codes, encoded, floats_of
from twofold.latent_attention import attention_layer, decoding_problem
from twofold.models.cache_choice import cache_spec_of
from twofold.models.causal_lm import CACHE_FIELD
from twofold.spec import ModelSpec

CODES = CacheSpec(bits=8, axis="head")
ROOM = replace(CODES, max_tokens=40)
HELD = {"growing": CODES, "pre-allocated": ROOM}
ONE = LLAMA.with_changes(qk_norm=False)
LATENT = LLAMA.with_changes(
    tie="(Q, K, V)", qk_norm=False, num_key_value_heads=4, latent_dim=24, positions=POSITIONS["shared"]
)
READING_CODES: dict[str, ModelSpec] = {
    "one tensor": ONE,
    "two tensors": GPT2,
    "normalised before": MODELS["stream"],
    "two normalised": LLAMA.with_changes(tie="(Q=K, V)", num_key_value_heads=4),
    "shared key": MODELS["shared"].with_changes(qk_norm=False),
    "latent": LATENT,
}


# Rounding


@given(
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([1e-4, 1.0, 300.0]),
    st.integers(0, 2**31),
)
def test_codes_are_off_by_half_a_step_at_most(dtype: torch.dtype, size: float, seed: int):
    drawn = torch.randn(2, 3, 7, 16, generator=torch.Generator().manual_seed(seed)) * size
    stream = drawn.to(dtype)
    codes, scales = encoded(stream)
    assert (codes.dtype, scales.dtype, codes.shape, scales.shape) == (
        torch.int8, torch.float32, stream.shape, (2, 3, 7, 1)
    )  # fmt: skip
    greatest = stream.double().abs().amax(dim=-1, keepdim=True)
    torch.testing.assert_close(scales.double(), greatest / MAX_CODE, rtol=1e-6, atol=0)
    assert codes.abs().amax(dim=-1).eq(MAX_CODE).all()
    error = (codes.double() * scales.double() - stream.double()).abs()
    assert (error <= scales.double() * 0.50001).all()
    read = floats_of(Codes(codes=codes, scales=scales, dtype=dtype))
    assert read.dtype == dtype
    limits = torch.finfo(dtype)
    wanted, least = codes.double() * scales.double(), limits.smallest_normal * limits.eps
    torch.testing.assert_close(read.double(), wanted, rtol=2 * limits.eps, atol=least)


def test_nothing_and_what_is_not_a_number():
    stream = torch.zeros(1, 1, 4, 8)
    stream[0, 0, 1, 3], stream[0, 0, 2, 3] = torch.nan, torch.inf
    codes, scales = encoded(stream)
    read = floats_of(Codes(codes=codes, scales=scales, dtype=torch.float32))
    assert torch.equal(read[0, 0, [0, 3]], torch.zeros(2, 8))
    assert read[0, 0, 1].isnan().all()
    assert not read[0, 0, 2].isfinite().any()


# What is held, and what a query reads


@pytest.mark.parametrize("name", READING_CODES)
@pytest.mark.parametrize("held", HELD)
@torch.no_grad()
def test_streams_are_codes_and_scales_and_a_shared_key_is_as_computed(held: str, name: str):
    spec = READING_CODES[name]
    cache = TiedCache(spec, HELD[held])
    step(drawn_model(spec).float(), cache, drawn_tokens(2, 5))
    for index, layer in enumerate(cache.layers):
        assert type(layer) is {"growing": TiedLayer, "pre-allocated": StaticTiedLayer}[held]
        attention = spec.attention(index)
        extension = attention.positions.key_extension_dim
        shapes = [
            (*shape, dtype)
            for heads, dim in cached_streams(attention)[: -1 if extension else None]
            for shape, dtype in (((heads, dim), torch.int8), ((heads, 1), torch.float32))
        ] + ([(1, extension, torch.float32)] if extension else [])
        assert [(s.shape[1], s.shape[3], s.dtype) for s in layer.streams] == shapes
        assert layer.keys is layer.streams[0]
        assert layer.values is layer.streams[2 if len(layer.streams) > 2 else 0]


@torch.no_grad()
def test_a_window_is_held_as_computed():
    cache = TiedCache(ONE.with_changes(window_tokens=(3, 0)), ROOM)
    for layer in cache.layers:
        layer.update(torch.ones(2, 3, 5, 8))
    assert [[stream.dtype for stream in layer.streams] for layer in cache.layers] == [
        [torch.float32],
        [torch.int8, torch.float32],
    ]


@pytest.mark.parametrize("held", HELD)
def test_a_query_reads_its_own_token_as_it_is_held(held: str):
    cache, stream = TiedCache(ONE, HELD[held]), torch.randn(2, 3, 6, 8, dtype=torch.float64)
    first, _ = cache.layers[0].update(stream[:, :, :4])
    assert isinstance(first, Codes)
    read, _ = cache.layers[0].update(stream[:, :, 4:])
    codes, scales = encoded(stream)
    assert torch.equal(read.codes, codes)
    assert torch.equal(read.scales, scales)
    assert read.dtype == torch.float64


def seen_by_kernels(monkeypatch: pytest.MonkeyPatch) -> list[Inputs]:
    """What attention hands over from now on."""
    seen: list[Inputs] = []
    monkeypatch.setattr(
        "twofold.attention.attend", lambda inputs, name: (seen.append(inputs), kernels.attend(inputs, name))[1]
    )
    return seen


def decoded(spec: ModelSpec, held: CacheSpec, *, backend: str = "auto", dtype: torch.dtype) -> Tensor:
    """Logits of some tokens after a prompt."""
    model, cache, tokens = (
        drawn_model(spec, std=0.2, backend=backend).to(dtype),
        TiedCache(spec, held),
        drawn_tokens(2, 24),
    )
    return torch.cat([step(model, cache, part) for part in tokens.split([19, 1, 1, 3], dim=1)], dim=1)


@given(st.integers(0, 2**31))
@torch.no_grad()
def test_attention_is_off_the_oracle_s_by_what_half_a_step_can_do(seed: int):
    """A logit by δ = α |q|₁ h at most, where h is half a step, so weights by exp(2δ) - 1 in all, and an output by h and so much of the greatest value."""
    spec = ONE.with_changes(positions=POSITIONS["none"], hidden_size=32, use_bias=False)
    layer = Attention(spec.attention(0)).double()
    generator = torch.Generator().manual_seed(seed)
    for projection in (layer.q_proj, layer.k_proj):
        projection.weight.copy_(torch.randn(projection.weight.shape, generator=generator) * 32**-0.5)
    layer.o_proj.weight.copy_(torch.eye(32))  # the heads as they are
    states = torch.randn(2, 11, 32, dtype=torch.float64, generator=generator)
    found = layer(states, cache=LayerView(TiedCache(spec, CODES), 0))
    stream = layer.k_proj(states).unflatten(2, (-1, 8)).transpose(1, 2)
    query = layer.q_proj(states).unflatten(2, (-1, 8))
    half, greatest = float(encoded(stream)[1].max()) / 2, float(stream.abs().max())
    delta = spec.attention(0).scale * float(query.abs().sum(dim=-1).max()) * half
    error = float((found - oracle.layer(spec.attention(0), layer.state_dict(), states)).abs().max())
    assert 0 < error <= 1.0001 * (half + math.expm1(2 * delta) * greatest)
    assert math.expm1(2 * delta) < 0.5  # so that it says something


@pytest.mark.skipif(not native.levels(), reason="Twofold was installed without a compiler")
@pytest.mark.parametrize("name", READING_CODES)
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_kernel_reads_the_codes(dtype: torch.dtype, held: str, name: str, monkeypatch: pytest.MonkeyPatch):
    spec, seen = READING_CODES[name], seen_by_kernels(monkeypatch)
    found = decoded(spec, HELD[held], dtype=dtype)
    later = [inputs for inputs in seen if inputs.query.shape[2] == 1]
    assert len(later) == 2 * spec.num_hidden_layers
    for inputs in later:
        assert inputs.key.dtype == inputs.value.dtype == torch.int8
        assert inputs.shares_value == (inputs.key_scales is inputs.value_scales)
        assert kernels.choose(inputs.problem).name == "native"
        # Where they lie, and not a copy.
        assert inputs.key.untyped_storage().nbytes() >= inputs.key.nbytes
    wanted = decoded(spec, HELD[held], backend="reference", dtype=torch.float64)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < (1e-3 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("positions", ["rotary", "shared"])
def test_a_key_that_is_changed_before_is_read_as_floats(positions: str, monkeypatch: pytest.MonkeyPatch):
    """QK-norm of a stream that is the value too."""
    seen = seen_by_kernels(monkeypatch)
    decoded(LLAMA.with_changes(positions=POSITIONS[positions]), CODES, dtype=torch.float32)
    assert {inputs.key.dtype for inputs in seen} == {inputs.value.dtype for inputs in seen} == {torch.float32}
    assert all(inputs.key_scales is inputs.value_scales is None for inputs in seen)


@pytest.mark.parametrize("name", [*READING_CODES, "changed before"])
@torch.no_grad()
def test_the_problem_told_is_the_problem_posed(name: str, monkeypatch: pytest.MonkeyPatch):
    spec = {**READING_CODES, "changed before": LLAMA}[name]
    attention, cache, seen = spec.attention(0), TiedCache(spec, CODES), seen_by_kernels(monkeypatch)
    layer = attention_layer(attention)
    layer(torch.randn(2, 9, spec.hidden_size), cache=LayerView(cache, 0))
    layer(torch.randn(2, 1, spec.hidden_size), cache=LayerView(cache, 0))
    codes = cache.cache_specs[0].holds_codes(attention.window_tokens)
    told = decoding_problem(attention, device="cpu", dtype="float32", num_keys=10, codes=codes)
    assert seen[-1].problem == told
    assert told.has_scales == (name != "changed before")
    if not attention.latent_dim:  # where many tokens are read out of the latent, as floats
        told = problem_of(attention, device="cpu", dtype="float32", num_queries=9, num_keys=9, codes=codes)
        assert seen[0].problem == told
        assert kernels.choose(told).name == "sdpa"


# In use


@pytest.mark.parametrize("name", ["one tensor", "shared key", "latent"])
def test_generate_makes_them(name: str):
    """Greedily and by beams, growing and pre-allocated, padded and in pieces: one text, and that of one pass over all of it."""
    spec = READING_CODES[name].with_changes(tie_word_embeddings=False)
    model, tokens = drawn_model(spec), drawn_tokens(3, 7)
    held: dict[str, Any] = {"cache_config": {"axis": "head"}}
    mask = (torch.arange(7) >= torch.tensor([[0], [2], [5]])).long()
    for options in ({}, {"attention_mask": mask}, {"num_beams": 3}, {"prefill_chunk_size": 3}):
        texts = [
            generated(model, tokens, cache_implementation=way, return_dict_in_generate=True, **options, **held)
            for way in ("dynamic", "quantized", "static", "offloaded")
        ]
        for text in texts:
            assert torch.equal(text.sequences, texts[0].sequences)
            layers = getattr(text, CACHE_FIELD).layers
            assert all(stream.dtype in (torch.int8, torch.float32) for layer in layers for stream in layer.streams[:2])
    text, longer = generated(model, tokens, **held), generated(model, tokens, 5, **held)
    assert torch.equal(text[:, :12], longer)
    with torch.no_grad():
        logits = model(text, cache=TiedCache(spec, CODES)).logits
    assert torch.equal(logits[:, 6:-1].argmax(dim=-1), text[:, 7:])


def test_options_and_files_say_how_they_are_held():
    assert cache_spec_of("static", {"axis": "head"}, 9) == replace(CODES, max_tokens=9)
    assert cache_spec_of("offloaded", {"axis": "head", "nbits": 8}, 9) == replace(CODES, offload=True)
    assert cache_spec_of("static", None, 9) == CacheSpec(max_tokens=9)
    assert CacheSpec(**CODES.to_dict()) == CODES
    # As it was written before there were codes.
    fields = {"max_tokens": 0, "bits": 8, "axis": "token", "group_size": 32, "tail_tokens": 4, "offload": False}
    assert CacheSpec(**fields).to_dict() == fields
    with pytest.raises(TwofoldError, match="holds codes of 8 bits, and 4 were asked for"):
        cache_spec_of("static", {"axis": "head", "nbits": 4}, 9)


@torch.no_grad()
def test_a_prompt_is_served_by_pytorch_and_no_weights_of_all_pairs_are_held(monkeypatch: pytest.MonkeyPatch):
    """Kernels for codes are for decoding; the plain backend, which holds them, is chosen by nobody."""
    monkeypatch.setattr(kernels.reference, "attend", None)
    cache = TiedCache(ONE, CODES)
    step(drawn_model(ONE).float(), cache, drawn_tokens(2, 30))
    assert int(cache.get_seq_length()) == 30


@pytest.mark.skipif(not native.levels(), reason="Twofold was installed without a compiler")
@torch.no_grad()
def test_a_compiled_step_hands_the_codes_to_the_compiled_kernel():
    """In one graph, and what the kernel is told is how many of the slots are filled."""
    model, tokens, graphs = drawn_model(ONE).float(), drawn_tokens(2, 12), []

    def keep(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph.graph)
        return graph.forward

    torch._dynamo.reset()
    found = []
    for call in (model.forward, torch.compile(model.forward, backend=keep, fullgraph=True)):
        cache = TiedCache(ONE, ROOM)
        step(model, cache, tokens[:, :9])
        found.append([call(part.clone(), cache=cache).logits for part in tokens[:, 9:].split(1, dim=1)])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
    (graph,) = graphs
    called = [node for node in graph.nodes if "native_attention" in str(node.target)]
    assert len(called) == ONE.num_hidden_layers
    for node in called:
        handed = dict(zip(native.HANDED_OVER, node.args[2], strict=True))
        assert {name for name, tensor in handed.items() if tensor is not None} >= {"key_scales", "lengths"}
        assert handed["value"] is handed["value_scales"] is None
        assert node.args[1].meta["example_value"].dtype == torch.int8
