"""Multi-head latent attention: one function expanded and absorbed, one latent in the cache, and what a model with it may be and costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attention_strategies import EXACT_BACKENDS, POSITIONS, UNTIED, drawn_layer, has_latent, specs
from model_strategies import GPT2, LLAMA, drawn_model, drawn_tokens
from test_attention import Streams, assert_agrees, cases
from twofold.attention import Attention, problem_of
from twofold.cache import TiedCache
from twofold.cost import cache_bytes, cached_floats_per_token, decode_flops_per_token, mean_cached_floats_per_token
from twofold.errors import TwofoldError
from twofold.estimate import Question, estimate_spec
from twofold.explain import explain, latent_note
from twofold.geometry.ours import sources
from twofold.kernels import Inputs, attend
from twofold.latent_attention import LatentAttention, attention_layer, decoding_problem
from twofold.layouts import convert
from twofold.models import load_model
from twofold.models.card import card_text
from twofold.models.parallel import check_tensor_parallel
from twofold.positions import NoPositions, RotaryPositions, SharedRotaryPositions
from twofold.spec import AttentionSpec
from twofold.tie import Tie

LATENT = AttentionSpec(
    tie=UNTIED,
    hidden_size=7,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    causal=True,
    positions=SharedRotaryPositions(dim=6, theta=100.0),
    latent_dim=5,
)
MODEL = GPT2.with_changes(tie="(Q, K, V)", latent_dim=24, positions=SharedRotaryPositions(dim=6))
LLAMA_LATENT = LLAMA.with_changes(
    tie="(Q, K, V)", qk_norm=False, num_key_value_heads=4, latent_dim=8, positions=SharedRotaryPositions(dim=4)
)


# One function


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
@given(data=st.data())
@settings(max_examples=25)
def test_the_module_is_the_oracle(backend: str, data: st.DataObject):
    assert_agrees(data.draw(cases(backend=backend, latent=True)))


def absorbed(layer: LatentAttention, states: Tensor, chunks: list[int]) -> Tensor:
    """Every chunk decoded in the latent, however long it is."""
    cache = Streams()
    layer._absorbs = lambda _: True
    return torch.cat([layer(part, cache=cache) for part in states.split(chunks, dim=1)], dim=1)


@given(specs(causal=True, latent=True), st.integers(0, 2**31), st.lists(st.integers(1, 5), min_size=1, max_size=4))
@settings(max_examples=60)
def test_absorbed_is_expanded(spec: AttentionSpec, seed: int, chunks: list[int]):
    generator = torch.Generator().manual_seed(seed)
    layer = drawn_layer(spec, generator)
    assert isinstance(layer, LatentAttention)
    states = torch.randn(2, sum(chunks), spec.hidden_size, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        found, wanted = absorbed(layer, states, chunks), layer(states)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_the_comparison_can_fail():
    layer = drawn_layer(LATENT, torch.Generator().manual_seed(0))
    assert isinstance(layer, LatentAttention)
    states = torch.randn(1, 3, 7, dtype=torch.float64)
    layer._matrices = lambda projection: 1.01 * LatentAttention._matrices(layer, projection)
    with torch.no_grad():
        assert float((absorbed(layer, states, [3]) - layer(states)).abs().max()) > 1e-4


def test_a_latent_as_wide_as_everything_is_ordinary_attention():
    """With W_C = 1, an input of mean square 1 and no epsilon the latent is the input, and K and V are projections of it."""
    wide = replace(LATENT, latent_dim=7, positions=NoPositions(), norm_eps=0.0)
    layer = drawn_layer(wide, torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.latent_proj.weight.copy_(torch.eye(7))
        layer.latent_norm.weight.fill_(1.0)
    ordinary = Attention(replace(wide, latent_dim=0)).double()
    ordinary.load_state_dict({name: w for name, w in layer.state_dict().items() if not name.startswith("latent")})
    states = torch.randn(2, 6, 7, dtype=torch.float64)
    states = states / states.square().mean(dim=-1, keepdim=True).sqrt()
    torch.testing.assert_close(layer(states), ordinary(states), rtol=1e-9, atol=1e-9)


# What is cached, and what a kernel reads


def posed(layer: Attention, monkeypatch: pytest.MonkeyPatch, tokens: int) -> Inputs:
    """What the kernel is given when one more token follows so many."""
    seen: list[Inputs] = []
    monkeypatch.setattr("twofold.attention.attend", lambda inputs, name: (seen.append(inputs), attend(inputs, name))[1])
    cache = Streams()
    with torch.no_grad():
        layer(torch.randn(2, tokens, 7), cache=cache)
        layer(torch.randn(2, 1, 7), cache=cache)
    assert [tuple(stream.shape) for stream in cache.held] == [(2, 1, tokens + 1, 5), (2, 1, tokens + 1, 6)]
    return seen[-1]


def test_one_token_reads_one_latent_as_key_and_value(monkeypatch: pytest.MonkeyPatch):
    inputs = posed(LatentAttention(LATENT), monkeypatch, 9)
    assert inputs.shares_value
    assert tuple(inputs.key.shape) == (2, 1, 10, 5)
    assert tuple(inputs.query.shape) == (2, 4, 1, 5 + 6)
    assert inputs.problem == decoding_problem(LATENT, device="cpu", dtype="float32", num_keys=10)


def test_the_problem_of_other_layers_is_theirs():
    other = replace(LATENT, latent_dim=0)
    told = decoding_problem(other, device="cpu", dtype="float32", num_keys=10)
    assert told == problem_of(other, device="cpu", dtype="float32", num_queries=1, num_keys=10)
    assert type(attention_layer(other)) is Attention


class Adapted(nn.Linear):
    """A projection that adds to what its matrix says, as adapters do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.sum(dim=-1, keepdim=True)


@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
def test_what_takes_the_place_of_a_projection_is_called(name: str):
    layer = drawn_layer(LATENT, torch.Generator().manual_seed(0))
    adapted = Adapted(5, 32, bias=False).double()
    adapted.load_state_dict(getattr(layer, name).state_dict())
    states, plain = torch.randn(1, 4, 7, dtype=torch.float64), Streams()
    before = [layer(part, cache=plain) for part in states.split(1, dim=1)]
    setattr(layer, name, adapted)
    cache = Streams()
    found = torch.cat([layer(part, cache=cache) for part in states.split(1, dim=1)], dim=1)
    torch.testing.assert_close(found, layer(states), rtol=1e-9, atol=1e-9)
    assert float((found - torch.cat(before, dim=1)).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("spec", [MODEL, LLAMA_LATENT], ids=["gpt2", "llama"])
def test_operations_of_decoding_are_those_that_torch_counts(spec):
    model, tokens = drawn_model(spec, backend="reference"), drawn_tokens(1, 12)
    cache = TiedCache(spec)
    with torch.no_grad():
        model(tokens[:, :11], past_key_values=cache)
        with FlopCounterMode(display=False) as counter:
            model(tokens[:, 11:], past_key_values=cache)
    assert counter.get_total_flops() == decode_flops_per_token(spec, 12)
    assert cache.nbytes == cache_bytes(spec, 12, "fp64") == 12 * 8 * cached_floats_per_token(spec)


def test_cached_floats_over_a_context_are_those_of_the_running_cache():
    """A layer with a window holds its window, however long the text is: GTA, MLA and windows."""
    gta = GPT2.with_changes(tie="(Q, K=V)", positions=SharedRotaryPositions(dim=4, key_dim=4))
    for spec in (MODEL, gta, gta.with_changes(window_tokens=(5, 0)), MODEL.with_changes(window_tokens=(3, 0))):
        cache = TiedCache(spec)
        with torch.no_grad():
            drawn_model(spec)(drawn_tokens(1, 11), past_key_values=cache)
        assert cache.nbytes / 8 / 11 == mean_cached_floats_per_token(spec, 11)
    assert mean_cached_floats_per_token(MODEL, 11) == cached_floats_per_token(MODEL)
    with pytest.raises(TwofoldError, match="at least 1"):
        mean_cached_floats_per_token(MODEL, 0)


# Models


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}, {"num_beams": 3}])
def test_generation_is_that_without_a_cache(options: dict):
    model, prompt = drawn_model(MODEL), drawn_tokens(2, 5)
    generate = {"max_new_tokens": 6, "do_sample": False}
    without = {name: value for name, value in options.items() if name == "num_beams"}
    wanted = model.generate(prompt, use_cache=False, **generate, **without)
    assert torch.equal(model.generate(prompt, **generate, **options), wanted)


def test_a_compiled_step_is_absorbed():
    model, tokens = drawn_model(MODEL), drawn_tokens(1, 6)
    explained = torch.compile(model, backend="eager", fullgraph=True)
    cache = TiedCache(MODEL)
    with torch.no_grad():
        found = explained(tokens, past_key_values=cache).logits
        wanted = model(tokens, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_it_comes_back_from_its_folder(tmp_path: Path):
    model = drawn_model(MODEL)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path, dtype=torch.float64)
    assert again.config.spec == MODEL
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())
    card = (tmp_path / "README.md").read_text()
    assert card == card_text(MODEL, dtype="fp64")
    assert "(Q, K, V), latent of 24" in card
    assert latent_note(MODEL) in card
    # 2 layers of 2 heads of 8, keys and values and 6 of the rotary key, against 24 and 6.
    assert f"| {2 * (2 * 16 + 6) * 8:,} | {2 * (24 + 6) * 8:,} |" in card


def test_it_is_explained_and_estimated():
    explained = explain("(Q, K, V)", MODEL, tokens=100)
    assert explained.mechanism == "(Q, K, V), latent of 24"
    assert "latent of 24 floats" in explained.ties[0].cache
    assert explained.ties[0].cached_roles == ()
    assert explained.notes == (latent_note(MODEL),)
    refused = explain("(Q, K=V)", MODEL)
    assert "use (Q, K, V) with it" in refused.refusal
    assert refused.notes == ()
    assert explain("(Q, K, V)", GPT2).notes == ()
    rows = estimate_spec(MODEL, "model", Question(tokens=10)).holdings
    bytes_by_name = {row.name: row.cache_bytes for row in rows if not row.bits}
    assert bytes_by_name == {
        "(Q, K, V), latent of 24": 10 * 2 * 2 * 30,
        "(Q, K, V)": 10 * 2 * 2 * 38,
        "(Q, K=V)": 10 * 2 * 2 * 22,
    }


# What there is not


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tie": Tie.parse("(Q, K=V)")}, r"no tie between them: use \(Q, K, V\)"),
        ({"tie": Tie.parse("(Q, K, V)+"), "causal": False}, r"use \(Q, K, V\) with it"),
        ({"num_key_value_heads": 2}, "use num_key_value_heads 4, not 2"),
        ({"qk_norm": True}, "leave qk_norm out"),
        ({"positions": RotaryPositions()}, "use shared_rotary positions"),
        ({"latent_dim": -1}, "use 0 for no latent"),
        ({"positions": SharedRotaryPositions(dim=4, key_dim=4)}, "V is a multiple of K"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict, says: str):
    with pytest.raises(TwofoldError, match=says) as caught:
        replace(LATENT, **changes)
    assert str(caught.value).count(". ") == 0


def test_every_scheme_that_does_not_turn_heads_has_a_latent():
    assert {name for name in POSITIONS if has_latent(POSITIONS[name])} == {"none", "learned", "shared", "bias"}


def test_other_layouts_and_parts_of_a_latent_are_refused():
    weights = drawn_layer(LATENT, torch.Generator().manual_seed(0)).state_dict()
    with pytest.raises(TwofoldError, match="the latent is normalised"):
        convert(weights, LATENT, source="free", target="roles")
    with pytest.raises(TwofoldError, match="read one latent"):
        check_tensor_parallel(MODEL, 2)
    with pytest.raises(TwofoldError, match="attends by LatentAttention"):
        sources(drawn_model(MODEL), [0])
    with pytest.raises(TwofoldError, match="latent_dim is"):
        MODEL.with_changes(latent_dim=1.5)
