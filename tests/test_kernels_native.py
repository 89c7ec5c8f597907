"""The compiled backend: every level that this processor has, against the reference in float64, with PyTorch's own kernel on the same inputs as the measure of error."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from twofold import kernels
from twofold.errors import TwofoldError
from twofold.kernels import Inputs, Mask, Rotation, native

pytestmark = pytest.mark.skipif(not native.levels(), reason="Twofold was installed without a compiler")

LENGTHS = [1, 15, 16, 17, 63, 65, 130, 1000]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Draw:
    """Tensors of a seed; what lies around them in memory is NaN, so that reading past an end is seen."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.guarded(torch.randn(shape, generator=self.generator).to(dtype))

    def guarded(self, x: torch.Tensor) -> torch.Tensor:
        """The same in a larger buffer, whose rows lie further apart than they are long, and not at a boundary of 64 bytes."""
        guard = torch.nan if x.is_floating_point() else 127
        buffer = torch.full((*x.shape[:-2], x.shape[-2] + 2, x.shape[-1] + 7), guard, dtype=x.dtype)
        view = buffer[..., 1:-1, 3 : 3 + x.shape[-1]]
        view.copy_(x)
        return view

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def rotation(
        self, keys: int, head_dim: int, pairs: int, *, is_steady: bool, dtype: torch.dtype, batch: int = 0
    ) -> Rotation:
        frequencies = 1.0 / 100.0 ** torch.linspace(0, 1, pairs, dtype=torch.float64)
        places = torch.arange(keys, dtype=torch.float64) + 5
        if not is_steady:
            places = torch.rand(batch or 1, 1, keys, generator=self.generator, dtype=torch.float64) * 50
        angles = places[..., None] * frequencies
        steady = (angles.cos().float(), angles.sin().float()) if is_steady else None
        return Rotation(
            cosine=angles.cos().to(dtype), sine=angles.sin().to(dtype), distance=head_dim // 2, steady=steady
        )


@st.composite
def problems(draw: st.DrawFn) -> Inputs:
    """All that the backend says it serves."""
    made = Draw(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    batch, kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (3, 2)]))
    group, num_queries = draw(st.sampled_from([(1, 1), (2, 1), (4, 1), (3, 3), (7, 2), (20, 1)]))
    head_dim = draw(st.sampled_from([16, 48, 64, 80, 128, 256]))
    num_keys = draw(st.sampled_from([length for length in LENGTHS if length >= num_queries]))
    codes = draw(st.sampled_from(["none", "none", "token", "channel"]))
    page = draw(st.sampled_from([0, 0, 16, 20]))
    pages_each = -(-num_keys // page) if page else 0
    shape = (batch * pages_each + 1, kv_heads, page) if page else (batch, kv_heads, num_keys)
    num_keys = page * pages_each if page else num_keys
    parts: dict[str, torch.Tensor | None] = {}
    for name in ("key", "value"):
        parts[name] = made.normal(*shape, head_dim, dtype=dtype)
        parts[f"{name}_scales"] = None
        if codes != "none":
            parts[name] = made.guarded(made.integers(-127, 128, *shape, head_dim).to(torch.int8))
            scales = made.normal(*shape, 1) if codes == "token" else made.normal(1, kv_heads, 1, head_dim)
            parts[f"{name}_scales"] = made.guarded(scales.abs() / 60)
    if draw(st.booleans()):
        parts |= {"value": parts["key"], "value_scales": parts["key_scales"]}
    turning = draw(st.sampled_from(["none", "full", "part", "table"]))
    rotation = None
    if turning != "none":
        pairs = head_dim // 2 if turning == "full" else head_dim // 4
        rotation = made.rotation(
            num_keys,
            head_dim,
            pairs,
            is_steady=turning != "table",
            dtype=dtype,
            batch=draw(st.sampled_from([0, batch])),
        )
    extension = 0 if page else draw(st.sampled_from([0, 0, 10, 16]))
    hides = draw(st.sampled_from(["nothing", "lengths", "mask", "positions"]))
    lengths = made.integers(0, num_keys + 1, batch) if hides == "lengths" or page else None
    positions = None
    if hides == "positions" and not page:
        places = torch.arange(num_keys) - draw(st.sampled_from([0, 3]))
        positions = (
            torch.arange(num_queries) + num_keys // 2,
            places[torch.randperm(num_keys, generator=made.generator)],
        )
    return Inputs(
        query=made.normal(batch, kv_heads * group, num_queries, head_dim + extension, dtype=dtype),
        mask=Mask(
            causal=num_queries > 1 or draw(st.booleans()),
            window_tokens=draw(st.sampled_from([0, 0, 1, 20, 200])),
            key_mask=torch.rand(batch, num_keys, generator=made.generator) < 0.6
            if hides == "mask" and not page
            else None,
            lengths=lengths,
            positions=positions,
        ),
        scale=head_dim**-0.5,
        key_scale=made.normal(1, head_dim)[0].abs() if draw(st.booleans()) else None,
        key_extension=made.normal(batch, 1, num_keys, extension, dtype=dtype) if extension else None,
        key_rotation=rotation,
        soft_cap=draw(st.sampled_from([0.0, 0.0, 3.0])),
        sinks=made.normal(1, kv_heads * group)[0] if draw(st.booleans()) else None,
        pages=torch.randperm(shape[0], generator=made.generator)[1:].reshape(batch, pages_each) if page else None,
        **parts,
    )


def in_float64(inputs: Inputs) -> torch.Tensor:
    """The reference, in float64."""
    wide = {
        name: None if (given := getattr(inputs, name)) is None else given.double()
        for name in ("query", "key_scale", "key_extension", "sinks")
    }
    plain = replace(inputs, query=wide["query"]).plain
    rotation = inputs.key_rotation
    if rotation is not None:
        tables = rotation.steady or (rotation.cosine, rotation.sine)
        rotation = Rotation(cosine=tables[0].double(), sine=tables[1].double(), distance=rotation.distance)
    return kernels.attend(replace(plain, key_rotation=rotation, **wide), "reference")


def of_pytorch(inputs: Inputs) -> torch.Tensor:
    """PyTorch's fused call on keys that were made beforehand; the plain products where it knows no soft cap and no sinks."""
    plain = inputs.plain
    if plain.key_scale is not None:
        plain = replace(plain, key_scale=plain.key_scale.to(plain.query.dtype))
    if plain.soft_cap or plain.sinks is not None:
        return kernels.attend(plain, "reference")
    return kernels.attend(plain, "sdpa")


def largest(x: torch.Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def check(inputs: Inputs, level: str) -> None:
    """At most twice the error of PyTorch's kernel, and what one rounding of values and logits makes."""
    assert native.supports(inputs.problem) == ""
    wanted, found = in_float64(inputs), native.attend(inputs, level=level)
    assert found.dtype == inputs.query.dtype
    assert found.shape == wanted.shape
    pytorch = largest(of_pytorch(inputs).double() - wanted)
    dtype = inputs.query.dtype
    floor = 2 * torch.finfo(dtype).eps * largest(inputs.plain.value.double())
    # The plain level rounds products before it adds them, as PyTorch would on a processor without fused multiplication; here PyTorch has it.
    roundings = 2 if level == "plain" else 1
    assert largest(found.double() - wanted) <= 2 * roundings * pytorch + floor


@pytest.mark.parametrize("level", native.levels())
@given(inputs=problems())
@settings(max_examples=300)
def test_every_level_is_as_exact_as_pytorch(level: str, inputs: Inputs):
    check(inputs, level)


@pytest.mark.long
@pytest.mark.parametrize("level", native.levels())
@given(inputs=problems())
@settings(max_examples=3000, deadline=None)
def test_every_level_is_as_exact_as_pytorch_often(level: str, inputs: Inputs):
    check(inputs, level)


def small(dtype: torch.dtype = torch.bfloat16, *, batch: int = 3, keys: int = 70, head_dim: int = 64) -> Inputs:
    made = Draw(0)
    key = made.normal(batch, 2, keys, head_dim, dtype=dtype)
    query = made.normal(batch, 8, 1, head_dim, dtype=dtype)
    return Inputs(query=query, key=key, value=key, mask=Mask(causal=True), scale=head_dim**-0.5)


@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_and_equal_logits(level: str, dtype: torch.dtype):
    inputs = small(dtype)
    check(replace(inputs, scale=40.0), level)
    check(replace(inputs, key=torch.ones_like(inputs.key), value=inputs.key), level)
    check(replace(inputs, key=torch.zeros_like(inputs.key), value=inputs.key), level)


@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("where", ["query", "key"])
def test_not_a_number_stays_in_its_row(level: str, where: str):
    inputs = small()
    key, query = inputs.key.clone(), inputs.query.clone()
    (query if where == "query" else key)[1, 1, 0, 3] = torch.nan
    found = native.attend(replace(inputs, query=query, key=key, value=key), level=level)
    broken = torch.zeros_like(found, dtype=torch.bool)
    broken[1, 1 if where == "query" else slice(4, 8)] = True
    assert found[broken].isnan().all()
    assert torch.equal(found[~broken], native.attend(inputs, level=level)[~broken])


@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("hide", ["lengths", "positions", "mask"])
def test_what_nobody_sees_may_be_anything(level: str, hide: str):
    """Slots of a pre-allocated cache that are not filled yet hold what was in memory before."""
    inputs, kept = small(), 33
    key = inputs.key.clone()
    key[:, :, kept:] = torch.nan
    places = torch.arange(70).masked_fill(torch.arange(70) >= kept, -1)
    masks = {
        "lengths": Mask(causal=True, lengths=torch.full((3,), kept)),
        "positions": Mask(causal=True, positions=(torch.tensor([kept - 1]), places)),
        "mask": Mask(causal=True, key_mask=(places >= 0).expand(3, -1)),
    }
    found = native.attend(replace(inputs, key=key, value=key, mask=masks[hide]), level=level)
    part = inputs.key[:, :, :kept]
    torch.testing.assert_close(found, native.attend(replace(inputs, key=part, value=part), level=level))


@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_codes_that_nobody_sees_may_be_anything(level: str, dtype: torch.dtype):
    inputs, kept = small(dtype), 33
    codes = (inputs.key * 30).to(torch.int8)
    scales = Draw(1).normal(3, 2, 70, 1).abs()
    filled = replace(inputs, key=codes, value=codes, key_scales=scales, value_scales=scales)
    unfilled = scales.clone()
    unfilled[:, :, kept:] = torch.nan
    hidden = Mask(causal=True, lengths=torch.full((3,), kept))
    wanted = native.attend(replace(filled, mask=hidden), level=level)
    found = native.attend(replace(filled, key_scales=unfilled, value_scales=unfilled, mask=hidden), level=level)
    assert not wanted.isnan().any()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_not_a_number_in_a_query_of_codes_stays_in_its_row(level: str, broken: float):
    inputs = small()
    codes, scales = (inputs.key * 30).to(torch.int8), Draw(1).normal(3, 2, 70, 1).abs()
    inputs = replace(inputs, key=codes, value=codes, key_scales=scales, value_scales=scales)
    query = inputs.query.clone()
    query[1, 1, 0, 3] = broken
    found, wanted = native.attend(replace(inputs, query=query), level=level), native.attend(inputs, level=level)
    assert found[1, 1].isnan().all()
    found[1, 1] = wanted[1, 1]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 2, 0)])
def test_nothing_to_do_is_done(shape: tuple[int, int, int]):
    batch, kv_heads, keys = shape
    key = torch.ones(batch, kv_heads, keys, 16)
    inputs = Inputs(query=torch.ones(batch, 4, 1, 16), key=key, value=key, mask=Mask(causal=True), scale=1.0)
    assert torch.equal(native.attend(inputs), torch.zeros(batch, 4, 1, 16))


def test_queries_without_keys_get_zero_and_a_sink_changes_nothing_of_that():
    inputs = small()
    for sinks in (None, torch.ones(8)):
        empty = replace(inputs, mask=Mask(causal=True, lengths=torch.tensor([0, 70, 3])), sinks=sinks)
        found = native.attend(empty)
        assert torch.equal(found[0], torch.zeros_like(found[0]))
        assert found[1:].abs().amax(dim=-1).gt(0).all()


@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("keys", [1025, 20_001, 70_000])
def test_long_texts_are_put_together_of_parts(level: str, keys: int):
    # Equal weights of values that rise along the text: a part that is left out, or read twice, moves their mean.
    inputs = small(batch=1, keys=keys, head_dim=16)
    rising = inputs.key + (8 * torch.linspace(0, 1, keys)[:, None]).to(inputs.key.dtype)
    check(replace(inputs, query=torch.zeros_like(inputs.query), key=rising, value=rising), level)


@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("head_dim", [64, 128])
def test_keys_turn_far_into_a_text(level: str, head_dim: int):
    # Logits so large that a few keys have all the weight: which they are depends on all of the turns before them.
    inputs = replace(small(torch.float32, batch=1, keys=20_001, head_dim=head_dim), scale=0.3)
    rotation = Draw(1).rotation(20_001, head_dim, head_dim // 2, is_steady=True, dtype=torch.float32)
    check(replace(inputs, key_rotation=rotation), level)


@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairs", [0, 8, 32])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_codes_fill_tiles(level: str, dtype: torch.dtype, pairs: int, head_dim: int):
    # A few keys have all the weight, wherever in a tile they lie; codes lie in a row, as caches hold them.
    made = Draw(2)
    query = 3 * made.normal(1, 8, 1, head_dim, dtype=dtype)
    codes, scales = made.integers(-127, 128, 1, 2, 1000, head_dim).to(torch.int8), made.normal(1, 2, 1000, 1).abs() / 60
    rotation = made.rotation(1000, head_dim, pairs, is_steady=True, dtype=dtype) if pairs else None
    inputs = Inputs(
        query=query, key=codes, value=codes, mask=Mask(causal=True), scale=head_dim**-0.5, key_rotation=rotation
    )
    check(replace(inputs, key_scales=scales, value_scales=scales), level)


@pytest.mark.parametrize("keys", [70, 5000, 40_000])
def test_other_texts_change_no_bit(keys: int):
    inputs = small(keys=keys)
    alone = replace(inputs, query=inputs.query[1:2], key=inputs.key[1:2], value=inputs.key[1:2])
    assert torch.equal(native.attend(inputs)[1:2], native.attend(alone))


@pytest.mark.parametrize("keys", [5000, 40_000])
def test_the_number_of_threads_changes_no_bit(keys: int):
    inputs = small(torch.float32, keys=keys)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(native.attend(inputs))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_many_callers_at_once():
    inputs = [small(dtype, keys=3000 + 10 * i) for i, dtype in enumerate(DTYPES * 3)]
    wanted = [native.attend(one) for one in inputs]
    found: list[list[torch.Tensor]] = [[] for _ in inputs]

    def decode(i: int) -> None:
        found[i] += [native.attend(inputs[i]) for _ in range(30)]

    callers = [threading.Thread(target=decode, args=(i,)) for i in range(len(inputs))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(
        len(many) == 30 and all(torch.equal(one, first) for one in many)
        for many, first in zip(found, wanted, strict=True)
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own():
    inputs = small(torch.float32, keys=5000)
    wanted = native.attend(inputs)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2)
        os._exit(0 if torch.equal(native.attend(inputs), wanted) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(native.attend(inputs), wanted)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"query": torch.ones(3, 8, 1, 32, dtype=torch.bfloat16)}, "as long as a key"),
        ({"query": torch.ones(2, 8, 1, 64, dtype=torch.bfloat16)}, "same number of sequences"),
        ({"query": torch.ones(3, 7, 1, 64, dtype=torch.bfloat16)}, "multiple"),
        ({"mask": Mask(causal=True, lengths=torch.tensor([1, 2]))}, "lengths"),
        ({"mask": Mask(causal=True, lengths=torch.tensor([1, 2, 71]))}, "lengths"),
        ({"mask": Mask(causal=True, key_mask=torch.ones(3, 9, dtype=torch.bool))}, "key_mask"),
        ({"key_scale": torch.ones(5)}, "key_scale"),
        ({"sinks": torch.ones(5)}, "sinks"),
        ({"pages": torch.zeros(3, 1, dtype=torch.long) + 3}, "pages"),
        ({"key_rotation": Rotation(cosine=torch.ones(9, 4), sine=torch.ones(9, 4), distance=32)}, "row for each key"),
        (
            {"key_rotation": Rotation(cosine=torch.ones(70, 4), sine=torch.ones(70, 4), distance=62)},
            "dimensions of the key",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_said(change: dict, says: str):
    with pytest.raises(TwofoldError, match=says):
        native.attend(replace(small(), **change))


def test_a_level_that_is_not_there_is_said():
    with pytest.raises(TwofoldError, match="no level avx9000: use one of plain"):
        native.attend(small(), level="avx9000")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"query": torch.ones(3, 8, 1, 64, dtype=torch.float64)}, "float64"),
        ({"bias": torch.ones(1)}, "bias"),
        ({"mask": Mask(causal=True, segments=torch.ones(3, 70))}, "one document"),
        ({"query": torch.ones(3, 8, 17, 64, dtype=torch.bfloat16)}, "up to 16 queries"),
        ({"query": torch.ones(3, 8, 70, 64, dtype=torch.bfloat16)}, "up to 16 queries"),
        (
            {name: torch.ones(3, 8, 1, 64, dtype=torch.bfloat16) for name in ("key", "value")}
            | {"query": torch.ones(3, 8, 2, 64, dtype=torch.bfloat16)},
            "the last of the text",
        ),
        ({"query": torch.ones(3, 8, 1, 64, dtype=torch.bfloat16, requires_grad=True)}, "gradient"),
    ],
)
def test_what_it_does_not_serve_is_said(change: dict, says: str):
    assert says in native.supports(replace(small(), **change).problem)


def test_without_a_compiler_the_choice_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "_native", None)
    choice = kernels.choose(small().problem)
    assert choice.name == "sdpa"
    assert "C++20 compiler" in choice.refused["native"]
    assert native.levels() == ()


def test_decoding_is_what_it_is_chosen_for():
    assert kernels.choose(small().problem).name == "native"


@torch.no_grad()
def test_in_a_compiled_graph_it_is_one_operator():
    inputs = small()
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph

    def decode(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return kernels.attend(replace(inputs, query=query, key=key, value=key))

    compiled = torch.compile(decode, backend=keep, fullgraph=True)
    assert torch.equal(compiled(inputs.query, inputs.key), native.attend(inputs))
    assert [
        str(node.target) for graph in graphs for node in graph.graph.nodes if "native_attention" in str(node.target)
    ]


def test_the_operator_tells_shapes_as_they_are():
    inputs = small(torch.float32)
    arguments = (inputs.query, inputs.key, [None] * len(native.HANDED_OVER), [1.0, 0.0], [1, 0, 0, 0], "")
    torch.library.opcheck(torch.ops.twofold.native_attention, arguments)


def test_two_tensors_and_one_are_the_same_function():
    inputs = small(torch.float32)
    two = replace(inputs, value=inputs.key.clone())
    torch.testing.assert_close(native.attend(two), native.attend(inputs), rtol=0, atol=0)
    wanted = F.scaled_dot_product_attention(inputs.query, inputs.key, inputs.key, enable_gqa=True)
    torch.testing.assert_close(native.attend(two), wanted)
