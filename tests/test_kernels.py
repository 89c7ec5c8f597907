"""Kernels: every backend against the plain one, masks against pairs, and a choice that is never silent."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold import kernels
from twofold.errors import TwofoldError
from twofold.kernels import BACKENDS, Backend, Inputs, Mask, Problem, Rotation


@st.composite
def inputs(draw: st.DrawFn) -> Inputs:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    batch, kv_heads, group = draw(st.sampled_from([(1, 1, 1), (2, 3, 1), (2, 1, 5), (3, 2, 3)]))
    num_keys = draw(st.sampled_from([1, 2, 7, 63, 65]))
    num_queries = draw(st.sampled_from([1, 2, num_keys, num_keys + 3]))  # a long text may read a short source
    extension, head_dim = draw(st.sampled_from([0, 2])), draw(st.sampled_from([4, 10]))
    key = normal(batch, kv_heads, num_keys, head_dim)
    rotation = None
    if draw(st.booleans()):
        angles = normal(num_keys, 2)
        rotation = Rotation(cosine=angles.cos(), sine=angles.sin(), distance=draw(st.sampled_from([2, head_dim - 2])))
    key_mask = torch.rand(batch, num_keys, generator=generator) < 0.5
    bias_heads = draw(st.sampled_from([0, 1, kv_heads * group]))
    return Inputs(
        query=normal(batch, kv_heads * group, num_queries, head_dim + extension),
        key=key,
        value=key if draw(st.booleans()) else normal(*key.shape),
        key_extension=normal(batch, 1, num_keys, extension) if extension else None,
        key_rotation=rotation,
        bias=normal(1, bias_heads, num_queries, num_keys) if bias_heads else None,
        mask=Mask(
            causal=draw(st.booleans()),
            window_tokens=draw(st.sampled_from([0, 1, 3, 64, 100])),
            key_mask=key_mask if draw(st.booleans()) else None,
        ),
        scale=draw(st.sampled_from([0.3, 1.0])),
    )


@pytest.mark.parametrize("name", ["sdpa", "folded"])
@given(given_inputs=inputs())
@settings(max_examples=200)
def test_backends_agree_with_the_plain_one(name: str, given_inputs: Inputs):
    found, wanted = kernels.attend(given_inputs, name), kernels.attend(given_inputs, "reference")
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_a_query_without_keys_gets_zero():
    ones = torch.ones(1, 1, 3, 4)
    mask = Mask(causal=True, key_mask=torch.tensor([[False, True, True]]))
    for name in ("sdpa", "folded", "reference"):
        output = kernels.attend(Inputs(query=ones, key=ones, value=ones, mask=mask, scale=1.0), name)
        assert output[0, 0, :, 0].tolist() == [0.0, 1.0, 1.0]


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 5)),
    causal=st.booleans(),
    window=st.integers(0, 4),
    seed=st.integers(0, 99),
    given_by=st.sets(st.sampled_from(["key_mask", "lengths"])),
)
def test_masks_against_pairs(sizes: tuple[int, int, int], causal: bool, window: int, seed: int, given_by: set[str]):
    """Also of more queries than keys, the first of which stand before the text."""
    batch, num_queries, num_keys = sizes
    draw = torch.Generator().manual_seed(seed)
    seen = torch.rand(batch, num_keys, generator=draw) < 0.5 if "key_mask" in given_by else None
    lengths = torch.randint(num_keys + 1, (batch,), generator=draw) if "lengths" in given_by else None
    mask = Mask(causal=causal, window_tokens=window, key_mask=seen, lengths=lengths)
    allowed = mask.allowed(num_queries, num_keys, torch.device("cpu")).expand(batch, 1, num_queries, num_keys)
    for b, t, s in product(range(batch), range(num_queries), range(num_keys)):
        length = num_keys if lengths is None else int(lengths[b])
        place = length - num_queries + t
        wanted = s < length and (place >= 0 or lengths is None) and (s <= place or not causal)
        wanted = wanted and (not window or abs(s - place) < window) and (seen is None or bool(seen[b, s]))
        assert bool(allowed[b, 0, t, s]) == wanted


# What only kernels of our own know: the reference against pairs written out one by one


@st.composite
def held(draw: st.DrawFn) -> Inputs:
    """Ragged texts, in a row or in pages, keys as floats or as codes, with soft caps and sinks."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    batch, kv_heads, group, head_dim = draw(st.sampled_from([(1, 1, 1, 4), (2, 3, 1, 6), (3, 2, 3, 4)]))
    page, num_pages = draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from([1, 3, 4]))
    in_pages, codes = draw(st.booleans()), draw(st.sampled_from(["none", "token", "channel"]))
    num_keys = page * num_pages
    shape = (batch * num_pages + 2, kv_heads, page) if in_pages else (batch, kv_heads, num_keys)
    pages = torch.randperm(batch * num_pages + 2, generator=generator)[2:].reshape(batch, num_pages)
    parts = {}
    for name in ("key", "value"):
        parts[name], parts[f"{name}_scales"] = normal(*shape, head_dim), None
        if codes != "none":
            parts[name] = torch.randint(-127, 128, (*shape, head_dim), generator=generator, dtype=torch.int8)
            scales = (*shape, 1) if codes == "token" else (1, kv_heads, 1, head_dim)
            parts[f"{name}_scales"] = normal(*scales).abs() / 50
    if draw(st.booleans()):
        parts |= {"value": parts["key"], "value_scales": parts["key_scales"]}
    num_queries = draw(st.sampled_from([1, 2]))
    return Inputs(
        query=normal(batch, kv_heads * group, num_queries, head_dim),
        mask=Mask(
            causal=True,
            window_tokens=draw(st.sampled_from([0, 1, 3])),
            lengths=torch.randint(0, num_keys + 1, (batch,), generator=generator),
        ),
        scale=0.4,
        soft_cap=draw(st.sampled_from([0.0, 2.0])),
        sinks=normal(kv_heads * group) if draw(st.booleans()) else None,
        pages=pages if in_pages else None,
        **parts,
    )


def one_by_one(given_inputs: Inputs) -> torch.Tensor:
    """Every query by itself, in Python's own numbers."""
    inputs, output = given_inputs, torch.zeros_like(given_inputs.query)
    group = inputs.query.shape[1] // inputs.key.shape[1]
    page = inputs.key.shape[2]

    def read(name: str, b: int, g: int, place: int) -> torch.Tensor:
        row = (b, g, place) if inputs.pages is None else (int(inputs.pages[b, place // page]), g, place % page)
        floats, scales = getattr(inputs, name)[row].double(), getattr(inputs, f"{name}_scales")
        if scales is None:
            return floats
        return floats * (scales[0, g, 0] if scales.shape[3] > 1 else scales[row])

    for b, h, t in product(*(range(size) for size in inputs.query.shape[:3])):
        place = int(inputs.mask.lengths[b]) - inputs.query.shape[2] + t
        first = max(0, place - inputs.mask.window_tokens + 1) if inputs.mask.window_tokens else 0
        exponentials, total = [], 0.0 if inputs.sinks is None else float(inputs.sinks[h].exp())
        for s in range(first, place + 1):
            logit = inputs.scale * float(inputs.query[b, h, t] @ read("key", b, h // group, s))
            logit = inputs.soft_cap * math.tanh(logit / inputs.soft_cap) if inputs.soft_cap else logit
            exponentials.append((math.exp(logit), s))
        total += sum(weight for weight, _ in exponentials)
        for weight, s in exponentials:
            output[b, h, t] += weight / total * read("value", b, h // group, s)
    return output


@given(given_inputs=held())
@settings(max_examples=150)
def test_the_plain_one_reads_pages_codes_and_ragged_texts(given_inputs: Inputs):
    found = kernels.attend(given_inputs, "reference")
    torch.testing.assert_close(found, one_by_one(given_inputs), rtol=1e-10, atol=1e-10)


def test_small_scales_are_no_worse_in_half_precision():
    """float16 has no scale of 1e-6 with more than a digit."""
    key = torch.randint(-127, 128, (1, 2, 9, 8), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    scales = torch.full((1, 2, 9, 1), 1e-6)
    query = torch.ones(1, 2, 1, 8, dtype=torch.float16)
    made = Inputs(query=query, key=key, value=key, key_scales=scales, mask=Mask(causal=True), scale=1.0).plain.key
    torch.testing.assert_close(made.double(), key.double() * 1e-6, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["sdpa", "folded"])
@given(given_inputs=held())
@settings(max_examples=100)
def test_backends_of_pytorch_make_floats_of_codes(name: str, given_inputs: Inputs):
    known = replace(given_inputs.plain, soft_cap=0.0, sinks=None)
    plain = replace(given_inputs, soft_cap=0.0, sinks=None)
    if plain.pages is None:
        wanted = kernels.attend(known, "reference")
        torch.testing.assert_close(kernels.attend(plain, name), wanted, rtol=1e-11, atol=1e-11)


def test_backends_of_pytorch_refuse_what_they_do_not_know():
    key = torch.ones(1, 1, 4, 8)
    inputs = Inputs(query=key[:, :, :1], key=key, value=key, mask=Mask(causal=True), scale=1.0, soft_cap=3.0)
    for name in ("sdpa", "folded"):
        with pytest.raises(TwofoldError, match="soft_cap"):
            kernels.attend(inputs, name)
    assert kernels.choose(replace(inputs, query=inputs.query.double()).problem).name == "reference"


def test_turning_back_undoes_turning():
    angles = torch.linspace(0, 3, 10, dtype=torch.float64).reshape(5, 2)
    rotation = Rotation(cosine=angles.cos(), sine=angles.sin(), distance=3)
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(rotation.turn_back(rotation.turn(x)), x)
    assert torch.equal(rotation.turn(x)[..., 2], x[..., 2])
    assert torch.equal(rotation.turn(x)[..., 5:], x[..., 5:])
    assert not torch.allclose(rotation.turn(x)[..., 0], x[..., 0])


PROBLEM = Problem(
    device="cpu", dtype="float32", key_dtype="float32", num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_queries=1, num_keys=9, causal=True
)  # fmt: skip


def test_the_choice_says_what_it_passed_over(monkeypatch: pytest.MonkeyPatch):
    refusing = Backend(attend=BACKENDS["reference"].attend, supports=lambda _: "it needs a machine that is not here")
    monkeypatch.setattr(kernels, "BACKENDS", {"fast": refusing, "sdpa": BACKENDS["sdpa"]})
    choice = kernels.choose(PROBLEM)
    assert choice.name == "sdpa"
    assert choice.refused == {"fast": "it needs a machine that is not here"}
    with pytest.raises(TwofoldError, match="fast: it needs a machine"):
        kernels.choose(PROBLEM, "fast")
    with pytest.raises(TwofoldError, match="no attention backend 'slow'"):
        kernels.choose(PROBLEM, "slow")


def test_grouped_decoding_reads_keys_where_they_are(monkeypatch: pytest.MonkeyPatch):
    """One query per sequence: the group is folded into the queries, so no key is repeated."""
    seen: list[tuple[int, ...]] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def record(query, key, value, *arguments, **options):
        seen.append((*query.shape, key.data_ptr()))
        return real(query, key, value, *arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    key = torch.randn(2, 3, 9, 8)
    kernels.attend(
        Inputs(query=torch.randn(2, 12, 1, 8), key=key, value=key, mask=Mask(causal=True), scale=1.0), "sdpa"
    )
    assert seen == [(2, 3, 4, 8, key.data_ptr())]
