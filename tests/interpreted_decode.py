"""The Triton kernel of decoding, carried out: by the interpreter on a CPU, or by a GPU where there is one. Run by ``test_triton_decode.py``.

What is right is the reference in float64; how much it may be missed by is what PyTorch's own kernel misses it by, twice, on keys and values that were made ready
for it. Sizes are small and odd, and programs few, so that keys are shared out in all ways.
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halving_models import gemma
from interpreter import DEVICE, IS_INTERPRETING, IS_ROOMY
from test_benchmarks import check_rows
from twofold import doctor, kernels
from twofold.cache import TiedCache
from twofold.cache_spec import CacheSpec
from twofold.existing import halve
from twofold.kernels import Inputs, Mask, Rotation, reference, scaled_dot_product, triton_decode
from twofold.kernels.triton import decode_launch
from twofold.models import build_model
from twofold.models.causal_lm import CACHE_FIELD
from twofold.positions import LearnedPositions, PositionScheme, RotaryPositions, SharedRotaryPositions
from twofold.presets import preset

# What NumPy says of the infinities that a softmax is made with.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = (torch.bfloat16, torch.float16)
CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def drawn(seed: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A function that draws tensors of a shape."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype).to(DEVICE)

    return normal


def rotation_of(
    num_keys: int, pairs: int, distance: int, dtype: torch.dtype, *, first: int = 0, steady: bool
) -> Rotation:
    frequencies = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64, device=DEVICE) / pairs)
    angles = torch.arange(first, first + num_keys, dtype=torch.float64, device=DEVICE)[:, None] * frequencies
    cosine, sine = angles.cos(), angles.sin()
    return Rotation(
        cosine=cosine.to(dtype), sine=sine.to(dtype), distance=distance,
        steady=(cosine.float(), sine.float()) if steady else None,
    )  # fmt: skip


def exact(inputs: Inputs) -> Inputs:
    """The same numbers in float64, codes as what they mean; of two tables of angles, the finer one."""
    plain, rotation, mask = inputs, inputs.key_rotation, inputs.mask
    doubled: dict[str, Any] = {}
    for name in ("query", "key_scale", "key_extension", "bias", "sinks", "key_scales", "value_scales"):
        tensor = getattr(plain, name)
        doubled[name] = None if tensor is None else tensor.double()
    doubled["key"] = plain.key if plain.key.dtype in CODES else plain.key.double()
    doubled["value"] = doubled["key"] if plain.shares_value else plain.value.double()
    if rotation is not None:
        cosine, sine = rotation.steady or (rotation.cosine, rotation.sine)
        doubled["key_rotation"] = Rotation(cosine=cosine.double(), sine=sine.double(), distance=rotation.distance)
    return replace(inputs, mask=mask, **doubled)


def by_pytorch(inputs: Inputs) -> Tensor:
    """PyTorch's call in the dtype of the query; what it does not know is undone before, or done by the reference in that dtype."""
    plain = inputs.plain
    if inputs.soft_cap or inputs.sinks is not None:
        return reference.attend(plain)
    return scaled_dot_product.attend(plain)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().max()) if wanted.numel() else 0.0


def assert_close(found: Tensor, inputs: Inputs) -> None:
    """As near to the truth as PyTorch, within a factor of 2; an output that is rounded once is as near as can be."""
    wanted = reference.attend(exact(inputs))
    rounding = torch.finfo(found.dtype).eps / 2 * float(wanted.abs().max())
    assert found.shape == wanted.shape
    assert error(found, wanted) <= 2 * max(error(by_pytorch(inputs), wanted), rounding)


@st.composite
def calls(draw: st.DrawFn) -> Inputs:
    """Heads, dims, keys that turn or are extended, masks, codes, pages: everything by itself and much of it together."""
    dtype = draw(st.sampled_from(DTYPES))
    normal = drawn(draw(st.integers(0, 2**31)), dtype)
    batch, kv_heads, group = draw(st.sampled_from([(1, 1, 1), (2, 3, 1), (1, 2, 5), (2, 1, 17), (1, 1, 64)]))
    head_dim, num_queries = draw(st.sampled_from([16, 64, 72, 80, 128, 192, 512])), draw(st.sampled_from([1, 1, 2, 5]))
    page = draw(st.sampled_from([0, 0, 16, 48]))
    num_keys = draw(st.sampled_from([7, 15, 16, 17, 63, 65, 130, 200])) if not page else page * draw(st.integers(1, 5))
    num_keys = max(num_keys, num_queries)
    shares, codes = draw(st.booleans()), draw(st.sampled_from([None, None, None, *CODES]))
    extension = draw(st.sampled_from([0, 0, 6, 32]))
    num_pages = -(-num_keys // page) if page else 0
    rows = (batch * num_pages + 1, kv_heads, page) if page else (batch, kv_heads, num_keys)
    num_keys = num_pages * page if page else num_keys
    streams = {"key": normal(*rows, head_dim), "key_scales": None, "value_scales": None}
    streams["value"] = normal(*rows, draw(st.sampled_from([head_dim, 48])))
    if codes is not None:
        per_token = draw(st.booleans())
        for name in ("key", "value"):
            stream = streams[name]
            streams[name] = (stream.float() * 30).clamp(-127, 127).round().to(codes)
            scales = (*rows, 1) if per_token else (1, kv_heads, 1, stream.shape[3])
            streams[f"{name}_scales"] = normal(*scales).float().abs() / 30 + 0.01
    if shares:
        streams |= {"value": streams["key"], "value_scales": streams["key_scales"]}
    rotation = None
    if draw(st.booleans()):
        pairs, distance = draw(
            st.sampled_from([(head_dim // 2, head_dim // 2), (8, 8), (head_dim // 8, head_dim // 2), (3, head_dim - 3)])
        )
        rotation = rotation_of(
            num_keys, pairs, distance, dtype, first=draw(st.sampled_from([0, 1000])), steady=draw(st.booleans())
        )
    masks: dict[str, Any] = {"window_tokens": draw(st.sampled_from([0, 0, 1, 9, 70]))}
    kind = "lengths" if page else draw(st.sampled_from(["all", "all", "key_mask", "lengths", "positions"]))
    random = torch.Generator().manual_seed(num_keys)
    if kind == "key_mask":
        masks["key_mask"] = (torch.rand(batch, num_keys, generator=random) < 0.6).to(DEVICE)
    elif kind == "lengths":
        masks["lengths"] = torch.randint(0, num_keys + 1, (batch,), generator=random).to(DEVICE)
    elif kind == "positions":
        places = torch.randperm(2 * num_keys, generator=random)[:num_keys] - num_keys // 3
        masks["positions"] = (torch.arange(num_keys, num_keys + num_queries).to(DEVICE), places.to(DEVICE))
    heads = kv_heads * group
    return Inputs(
        query=normal(batch, heads, num_queries, head_dim + extension),
        **streams,
        mask=Mask(causal=draw(st.booleans()), **masks),
        scale=(head_dim + extension) ** -0.5,
        key_scale=normal(head_dim) if draw(st.booleans()) else None,
        key_extension=normal(batch, 1, num_keys, extension) if extension else None,
        key_rotation=rotation,
        bias=normal(1, draw(st.sampled_from([1, heads])), num_queries, num_keys) if draw(st.booleans()) else None,
        soft_cap=draw(st.sampled_from([0.0, 0.0, 5.0])),
        sinks=normal(heads).float() if draw(st.booleans()) else None,
        pages=torch.randperm(rows[0])[1:].reshape(batch, num_pages).to(DEVICE) if page else None,
    )


@given(inputs=calls())
@settings(max_examples=40)
def test_it_is_as_near_to_the_truth_as_pytorch(inputs: Inputs):
    assert_close(kernels.attend(inputs, "triton_decode"), inputs)


def test_the_comparison_notices_a_small_error():
    normal = drawn(0)
    key = normal(1, 2, 130, 64)
    inputs = Inputs(query=normal(1, 4, 1, 64), key=key, value=key, mask=Mask(causal=True), scale=0.2)
    output = triton_decode.attend(inputs)
    assert_close(output, inputs)
    for wrong in (output * 1.03, output.roll(1, dims=1), triton_decode.attend(replace(inputs, scale=0.21))):
        with pytest.raises(AssertionError):
            assert_close(wrong, inputs)


def test_every_length_of_a_ragged_batch():
    """What lies beyond a length is NaN, as memory that was never written may be."""
    lengths = torch.tensor([1, 15, 16, 17, 63, 65, 1000, 0], device=DEVICE)
    normal = drawn(1)
    key = normal(len(lengths), 2, 1000, 64)
    inputs = Inputs(
        query=normal(len(lengths), 6, 1, 64), key=key, value=key, mask=Mask(causal=True, lengths=lengths), scale=0.125
    )
    beyond = torch.arange(1000, device=DEVICE) >= lengths[:, None]
    unwritten = key.masked_fill(beyond[:, None, :, None], torch.nan)
    found = triton_decode.attend(replace(inputs, key=unwritten, value=unwritten))
    assert_close(found, inputs)
    assert torch.equal(found[-1], torch.zeros_like(found[-1]))


@pytest.mark.parametrize(
    ("multiprocessors", "head_dim", "wanted"), [(1, 32, 4), (3, 32, 12), (40, 32, 12), (40, 512, 24)]
)
@pytest.mark.parametrize("num_queries", [1, 3])
def test_into_however_many_parts_keys_are_shared_out(
    multiprocessors: int, head_dim: int, wanted: int, num_queries: int, monkeypatch: pytest.MonkeyPatch
):
    """Those of the widest heads are added up in more than one round."""
    seen = []
    plan_for = decode_launch.plan_for
    monkeypatch.setattr(decode_launch, "multiprocessors", lambda _: multiprocessors)
    monkeypatch.setattr(decode_launch, "plan_for", lambda inputs: seen.append(plan_for(inputs)) or seen[-1])
    normal = drawn(2)
    key, query = normal(1, 1, 1500, head_dim), normal(1, 4, num_queries, head_dim)
    sinks = normal(4).float()
    inputs = Inputs(query=query, key=key, value=key, mask=Mask(causal=True), scale=1.7 * head_dim**-0.5, sinks=sinks)
    assert_close(triton_decode.attend(inputs), inputs)
    ((plan, parts),) = seen
    assert parts == wanted
    assert (parts > plan.parts_at_a_time) == (head_dim == 512)


def test_large_and_equal_logits():
    normal = drawn(3)
    key = normal(2, 1, 200, 64)
    large = Inputs(query=normal(2, 2, 1, 64, scale=300.0), key=key, value=key, mask=Mask(causal=True), scale=1.0)
    assert_close(triton_decode.attend(large), large)
    equal = replace(large, query=torch.zeros_like(large.query))
    assert_close(triton_decode.attend(equal), equal)
    same = replace(large, key=(ones := torch.ones_like(key)), value=ones)
    assert torch.equal(triton_decode.attend(same), torch.ones_like(large.query))
    lowest = torch.full((1, 1, 1, 200), torch.finfo(key.dtype).min, dtype=key.dtype, device=DEVICE)
    hidden = replace(equal, bias=lowest)  # as Transformers hides all keys from a query of padding
    assert_close(triton_decode.attend(hidden), equal)


def test_a_query_without_keys_gets_zero():
    normal = drawn(4)
    key = normal(2, 2, 40, 16)
    mask = torch.zeros(2, 40, dtype=torch.bool, device=DEVICE)
    mask[1, 7] = True
    inputs = Inputs(query=normal(2, 2, 2, 16), key=key, value=key, mask=Mask(causal=True, key_mask=mask), scale=1.0)
    for sinks in (None, normal(2).float(), torch.full((2,), -torch.inf, device=DEVICE)):
        output = triton_decode.attend(replace(inputs, sinks=sinks))
        assert not output[0].any()
        assert output[1].any()
    assert torch.equal(triton_decode.attend(inputs)[1], key[1, :, 7:8].expand(-1, 2, -1))
    # Of a text of one token the first of two queries stands before it, and nowhere.
    alone = replace(inputs, mask=Mask(causal=False, lengths=torch.tensor([1, 0], device=DEVICE)))
    output = triton_decode.attend(alone)
    assert torch.equal(output[0, :, 1], key[0, :, 0])
    assert not output[0, :, 0].any()
    assert not output[1].any()
    assert_close(output, alone)


def test_nan_stays_in_its_row():
    normal = drawn(5)
    key, query = normal(2, 2, 100, 32), normal(2, 4, 2, 32)
    inputs = Inputs(query=query, key=key, value=key, mask=Mask(causal=True), scale=0.2)
    clean = triton_decode.attend(inputs)
    key[1, 0, 17] = torch.nan  # read by heads 0 and 1 of the second sequence
    query[0, 3, 1] = torch.inf
    found = triton_decode.attend(inputs)
    touched = torch.zeros(2, 4, 2, dtype=torch.bool)
    touched[1, :2], touched[0, 3, 1] = True, True
    assert found[touched].isnan().all()
    assert torch.equal(found[~touched], clean[~touched])


def in_nan(tensor: Tensor, *, offset: int, stride: int = 1) -> Tensor:
    """The same numbers in a larger buffer of NaN: between the dimensions, before and behind them, and ``stride`` apart in the last."""
    *sizes, last = tensor.shape
    room = torch.full((*(size + 2 for size in sizes), last * stride + 9), torch.nan, dtype=tensor.dtype, device=DEVICE)
    part = room[tuple(slice(1, size + 1) for size in sizes)][..., offset : offset + last * stride : stride]
    return part.copy_(tensor)


@pytest.mark.parametrize(("offset", "stride"), [(0, 1), (3, 1), (1, 2)])
@pytest.mark.parametrize(("pairs", "distance"), [(24, 40), (16, 64)])
def test_tensors_that_lie_anyhow_are_read_within_their_bounds(pairs: int, distance: int, offset: int, stride: int):
    normal = drawn(6)
    key, query, value = normal(2, 2, 70, 80), normal(2, 6, 2, 96), normal(2, 2, 70, 40)
    extension, rotation = normal(2, 1, 70, 16), rotation_of(70, pairs, distance, torch.bfloat16, steady=False)
    inputs = Inputs(
        query=query, key=key, value=value, key_extension=extension, key_rotation=rotation, mask=Mask(causal=True),
        scale=0.1, bias=normal(2, 6, 2, 70), sinks=normal(6), key_scale=normal(80),
    )  # fmt: skip
    lying = {name: in_nan(getattr(inputs, name), offset=offset, stride=stride) for name in (
        "query", "key", "value", "key_extension", "bias", "sinks", "key_scale"
    )}  # fmt: skip
    tables = [in_nan(table, offset=offset, stride=stride) for table in (rotation.cosine, rotation.sine)]
    turning = Rotation(cosine=tables[0], sine=tables[1], distance=rotation.distance)
    found = triton_decode.attend(replace(inputs, **lying, key_rotation=turning))
    assert torch.equal(found, triton_decode.attend(inputs))
    shared = replace(inputs, value=inputs.key, key=inputs.key)
    found = triton_decode.attend(replace(shared, key=lying["key"], value=lying["key"]))
    assert torch.equal(found, triton_decode.attend(shared))


def far_apart(tensor: Tensor, dim: int, stride: int) -> Tensor:
    """The same numbers, ``stride`` apart along a dimension, in room of which no more is ever touched."""
    strides = list(tensor.stride())
    strides[dim] = stride
    room = torch.empty(stride * (tensor.shape[dim] - 1) + tensor.numel(), dtype=tensor.dtype, device=DEVICE)
    return room.as_strided(tensor.shape, strides).copy_(tensor)


@pytest.mark.skipif(not IS_ROOMY, reason="this GPU has not so much memory")
def test_tensors_may_be_larger_than_32_bits_can_count():
    normal = drawn(12)
    inputs = Inputs(
        query=normal(1, 4, 2, 16), key=normal(1, 2, 33, 16), value=normal(1, 2, 33, 16), mask=Mask(causal=True),
        scale=0.2, bias=normal(1, 4, 2, 33), key_rotation=rotation_of(33, 8, 8, torch.bfloat16, steady=True),
    )  # fmt: skip
    wanted = triton_decode.attend(inputs)
    apart = (2**31 // 3 + 16, 2**31 // 32 + 16)
    for name, dim, stride in (
        ("query", 1, apart[0]),
        ("key", 2, apart[1]),
        ("value", 2, apart[1]),
        ("bias", 1, apart[0]),
    ):
        far = replace(inputs, **{name: far_apart(getattr(inputs, name), dim, stride)})
        assert torch.equal(triton_decode.attend(far), wanted), name


def test_a_window_may_be_wider_than_any_text():
    normal = drawn(13)
    key = normal(2, 1, 70, 16)
    inputs = Inputs(query=normal(2, 2, 3, 16), key=key, value=key, mask=Mask(causal=True), scale=0.3)
    wanted = triton_decode.attend(inputs)
    for window in (70, 2**31 - 1, sys.maxsize):
        mask = Mask(causal=True, window_tokens=window)
        assert torch.equal(triton_decode.attend(replace(inputs, mask=mask)), wanted)


def test_steady_tables_may_lie_otherwise_than_the_others():
    """And are read within their bounds."""
    normal = drawn(14)
    rotation = rotation_of(70, 8, 8, torch.bfloat16, steady=True)
    key = normal(1, 2, 70, 16)
    inputs = Inputs(
        query=normal(1, 2, 1, 16), key=key, value=key, mask=Mask(causal=True), scale=0.3, key_rotation=rotation
    )
    assert rotation.steady is not None
    cosine, sine = (in_nan(table, offset=3) for table in rotation.steady)
    lying = replace(inputs, key_rotation=replace(rotation, steady=(cosine, sine)))
    assert torch.equal(triton_decode.attend(lying), triton_decode.attend(inputs))


@pytest.mark.parametrize("dtype", CODES)
def test_codes_beyond_a_length_are_not_read(dtype: torch.dtype):
    """Of those of floats some mean NaN; scales that were never written are NaN."""
    normal = drawn(7)
    lengths = torch.tensor([40, 3], device=DEVICE)
    key = normal(2, 1, 90, 64).to(dtype)
    scales = normal(2, 1, 90, 1).float().abs()
    inputs = Inputs(
        query=normal(2, 3, 1, 64), key=key, value=key, mask=Mask(causal=True, lengths=lengths), scale=0.2,
        key_scales=scales, value_scales=scales,
    )  # fmt: skip
    wanted = triton_decode.attend(inputs)
    beyond = (torch.arange(90, device=DEVICE) >= lengths[:, None])[:, None, :, None]
    unwritten = torch.where(beyond, torch.tensor(-1, dtype=torch.int8, device=DEVICE), key.view(torch.int8)).view(dtype)
    scales = scales.masked_fill(beyond, torch.nan)
    found = triton_decode.attend(
        replace(inputs, key=unwritten, value=unwritten, key_scales=scales, value_scales=scales)
    )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("size", [0.01, 3000.0])
def test_codes_may_mean_numbers_of_any_size(size: float):
    """Many keys weigh little beside one, and what their codes are multiplied by is small, large or 0: float16 has little room for both."""
    dtype = torch.float16
    normal = drawn(15, dtype)
    stream = drawn(15, torch.float32)(1, 1, 6000, 16) * size
    scales = stream.abs().amax(dim=3, keepdim=True) / 127
    scales[0, 0, :64] = 0  # nothing but zeros
    codes = (stream / scales.clamp(min=1e-9)).round().clamp(-127, 127).to(torch.int8)
    bias = torch.full((1, 1, 1, 6000), -6.0, dtype=dtype, device=DEVICE)
    bias[..., 5000] = 0
    inputs = Inputs(
        query=normal(1, 2, 1, 16), key=codes, value=codes, mask=Mask(causal=True), scale=0.1 / size, bias=bias,
        key_scales=scales, value_scales=scales,
    )  # fmt: skip
    assert_close(triton_decode.attend(inputs), inputs)


@pytest.mark.parametrize("page", [16, 32, 48, 128])
def test_pages_are_rows_that_lie_anywhere(page: int):
    """As vLLM lays them out: [pages, tokens, heads, dims], of which only those of a text are written."""
    normal = drawn(8)
    lengths = torch.tensor([2 * page + 5, 1, 3 * page], device=DEVICE)
    rows = normal(3, 2, 3 * page, 64)
    table = torch.randperm(11, generator=torch.Generator().manual_seed(0))[:9].reshape(3, 3).to(torch.int32).to(DEVICE)
    pages = torch.full((11, page, 2, 64), torch.nan, dtype=rows.dtype, device=DEVICE)
    for text, length in enumerate(lengths.tolist()):
        for place in range(length):
            pages[table[text, place // page], place % page] = rows[text, :, place]
    for text, length in enumerate(lengths.tolist()):
        table[text, -(-length // page) :] = -1  # no page yet
    inputs = Inputs(query=normal(3, 4, 2, 64), key=rows, value=rows, mask=Mask(causal=True, lengths=lengths), scale=0.2)
    paged = pages.transpose(1, 2)
    found = triton_decode.attend(replace(inputs, key=paged, value=paged, pages=table))
    assert torch.equal(found, triton_decode.attend(inputs))


def test_an_empty_batch():
    key = torch.zeros(0, 2, 9, 16, dtype=torch.bfloat16, device=DEVICE)
    query = torch.zeros(0, 4, 1, 16, dtype=torch.bfloat16, device=DEVICE)
    output = triton_decode.attend(Inputs(query=query, key=key, value=key, mask=Mask(causal=True), scale=1.0))
    assert output.shape == (0, 4, 1, 16)
    nothing = torch.zeros(1, 2, 0, 16, dtype=torch.bfloat16, device=DEVICE)
    mask = Mask(causal=True, lengths=torch.tensor([0], device=DEVICE))
    inputs = Inputs(query=query.new_ones(1, 4, 1, 16), key=nothing, value=nothing, mask=mask, scale=1.0)
    assert not triton_decode.attend(inputs).any()


@pytest.mark.parametrize("first", [0, 5, 100_000])
@pytest.mark.parametrize(("head_dim", "pairs", "distance"), [(64, 32, 32), (512, 64, 256), (80, 16, 16)])
def test_steady_turning_is_the_turning_of_each_key(first: int, head_dim: int, pairs: int, distance: int):
    """Far from the first position as near to it; the tables in 16 bits are another function, which these are nearer to."""
    normal = drawn(9)
    key = normal(1, 1, 300, head_dim)
    inputs = Inputs(
        query=normal(1, 4, 1, head_dim), key=key, value=key, mask=Mask(causal=True), scale=2 * head_dim**-0.5,
        key_rotation=rotation_of(300, pairs, distance, torch.bfloat16, first=first, steady=True),
    )  # fmt: skip
    assert_close(triton_decode.attend(inputs), inputs)
    rotation = inputs.key_rotation
    assert rotation is not None
    # Scaled tables, as those of YaRN, and rows of a batch that begin at positions of their own.
    tables = [1.2 * table for table in (rotation.cosine, rotation.sine, *(rotation.steady or ()))]
    cosine, sine, *steady = (torch.stack((table, table.roll(-7, 0)))[:, None, :290] for table in tables)
    rotation = Rotation(cosine=cosine, sine=sine, distance=distance, steady=(steady[0], steady[1]))
    key, query = key[:, :, :290].expand(2, -1, -1, -1), inputs.query.expand(2, -1, -1, -1)
    scaled = replace(inputs, query=query, key=key, value=key, key_rotation=rotation)
    assert_close(triton_decode.attend(scaled), scaled)


# torch.compile


def arguments_of(inputs: Inputs) -> tuple:
    value = None if inputs.shares_value else inputs.value
    counts = [int(inputs.mask.causal), inputs.mask.window_tokens, 0]
    return inputs.query, inputs.key, value, triton_decode._others(inputs), counts, [inputs.scale, inputs.soft_cap]


def test_it_is_an_operator_that_torch_knows():
    normal = drawn(10)
    key = normal(2, 1, 33, 16)
    inputs = Inputs(query=normal(2, 3, 2, 16), key=key, value=key, mask=Mask(causal=True, window_tokens=9), scale=0.3)
    for given_inputs in (inputs, replace(inputs, value=normal(2, 1, 33, 24), sinks=normal(3))):
        torch.library.opcheck(triton_decode._operator, arguments_of(given_inputs))


@pytest.mark.parametrize("shares", [True, False])
def test_it_does_not_break_a_graph(shares: bool):
    normal = drawn(11)
    rotation = rotation_of(65, 8, 8, torch.bfloat16, steady=True)

    def attend(query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        mask = Mask(causal=True, positions=(positions, torch.arange(65, device=DEVICE)))
        inputs = Inputs(
            query=query, key=key, value=key if shares else value, mask=mask, scale=0.4, key_rotation=rotation
        )
        return kernels.attend(inputs, "triton_decode") * 2

    given_tensors = normal(2, 4, 1, 16), normal(2, 2, 65, 16), normal(2, 2, 65, 16), torch.tensor([40], device=DEVICE)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given_tensors), attend(*given_tensors))
    assert not torch.equal(attend(*given_tensors[:3], given_tensors[3] - 5), attend(*given_tensors))


# Models, and the doctor


@pytest.mark.parametrize("name", ["triton_decode", "triton_prefill"])
def test_the_doctor_tries_it(name: str):
    """In a dtype that it serves."""
    assert "agrees with the reference in float64" in doctor._try_backend(name)


@pytest.fixture
def calls_seen(monkeypatch: pytest.MonkeyPatch) -> list[Inputs]:
    """The calls that reach the kernel, where a CPU has no kernel of its own."""
    seen: list[Inputs] = []

    def attend(inputs: Inputs) -> Tensor:
        seen.append(inputs)
        return triton_decode.attend(inputs)

    served = kernels.Backend(attend=attend, supports=triton_decode.supports)
    others = {name: backend for name, backend in kernels.BACKENDS.items() if name in ("sdpa", "reference", "folded")}
    monkeypatch.setattr(kernels, "BACKENDS", {"triton_decode": served, **others})
    return seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize(
    "held", [CacheSpec(), CacheSpec(max_tokens=40), CacheSpec(max_tokens=40, bits=8, axis="head")], ids=str
)
@pytest.mark.parametrize("positions", [LearnedPositions(length=64), RotaryPositions(), SharedRotaryPositions(dim=8)])
def test_our_models_decode_with_it(positions: PositionScheme, held: CacheSpec, window: int, calls_seen: list[Inputs]):
    """From caches that grow, that have room, that are rings, and from codes."""
    spec = preset("tiny").with_changes(
        tie="(Q, K=V)", num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=64, head_dim=16,
        intermediate_size=33, positions=positions, window_tokens=(window, 0), vocab_size=50,
    )  # fmt: skip
    model = build_model(spec, seed=0).eval().to(torch.bfloat16).to(DEVICE)
    other = build_model(spec, seed=0, backend="reference").eval().to(torch.bfloat16).to(DEVICE)
    text = torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    caches = [TiedCache(spec, held) for _ in range(2)]
    with torch.no_grad():
        for part in (text[:, :20], *text[:, 20:].split(1, dim=1)):
            found, wanted = (
                one(part, **{CACHE_FIELD: cache}).logits.float()
                for one, cache in zip((model, other), caches, strict=True)
            )
            torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    assert len(calls_seen) == 2 * 4
    assert all(inputs.shares_value for inputs in calls_seen)
    codes = {inputs.key.dtype == torch.int8 for inputs in calls_seen if not inputs.mask.window_tokens}
    assert codes == {held.axis == "head"}


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_of_a_model_has_it_in_one_graph(monkeypatch: pytest.MonkeyPatch):
    """And says how many keys the cache holds, so that room without keys is not read."""
    backends = {name: backend for name, backend in kernels.BACKENDS.items() if name != "native"}
    monkeypatch.setattr(kernels, "BACKENDS", backends)
    spec = preset("tiny").with_changes(
        tie="(Q, K=V)", num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=64, head_dim=16,
        intermediate_size=33, positions=RotaryPositions(), vocab_size=50,
    )  # fmt: skip
    model = build_model(spec, seed=0).eval().to(torch.bfloat16).to(DEVICE)
    text = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.graph)
        return graph.forward

    found = []
    for step in (model.forward, torch.compile(model.forward, fullgraph=True, dynamic=False, backend=keep)):
        cache = TiedCache(spec, CacheSpec(max_tokens=300))
        with torch.no_grad():
            model(text[:, :10], **{CACHE_FIELD: cache})
            found.append([step(part, **{CACHE_FIELD: cache}).logits for part in text[:, 10:].split(1, dim=1)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)
    (graph,) = graphs
    steps = [node for node in graph.nodes if "triton_decode" in str(node.target)]
    assert len(steps) == 2
    for node in steps:
        named = dict(zip(triton_decode.OTHERS, node.args[3], strict=True))
        assert named["lengths"] is not None
        assert named["steady_cosine"] is not None
        assert node.args[2] is None  # one tensor


@pytest.mark.filterwarnings("ignore")
def test_halved_layers_of_gemma_decode_with_it(calls_seen: list[Inputs]):
    model = gemma().to(torch.bfloat16).to(DEVICE)
    text = torch.randint(99, (2, 12), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = []
    for is_halved in (False, True):
        if is_halved:
            halve(model)
        with torch.no_grad():
            cache = model(text, use_cache=True)[CACHE_FIELD]
            calls_seen.clear()
            found.append(model(text[:, :1], **{CACHE_FIELD: cache}).logits.float())
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.05)
    assert calls_seen
    for inputs in calls_seen:
        assert inputs.shares_value
        assert inputs.key_scale is not None
        assert inputs.key_rotation is not None
        assert inputs.key_rotation.steady is not None


# The benchmark


@pytest.mark.skipif(not IS_INTERPRETING, reason="where there is a GPU, the benchmark itself can be run")
@pytest.mark.filterwarnings("ignore")
def test_the_benchmark_checks_and_times_everything(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    decode_gpu = importlib.import_module("decode_gpu")
    decode_gpu.main(["--self-check", "--json"])
    said = json.loads(capsys.readouterr().out)
    check_rows(said)
    rows = {row["name"]: row for row in said}
    for shape in map(decode_gpu.Shape.parse, decode_gpu.TINY):
        for name in ("one tensor", "two tensors", "turned", "int8", "pages of 16", "PyTorch, two: products", "memory"):
            assert rows[f"{shape}: {name}"]["value"] > 0
        assert rows[f"{shape}: one tensor / PyTorch's best with v = k"]["goal"] == "<= 1.0"
    assert any(name.startswith("(Q, K=V), rotary positions") for name in rows)
    assert any(name.startswith("Gemma 4's shape") and "without the kernel" in name for name in rows)
    # Nothing that is wrong is timed: PyTorch's is left out, and ours ends it.
    of_pytorch = decode_gpu.of_pytorch
    monkeypatch.setattr(
        decode_gpu,
        "of_pytorch",
        lambda query, *given: of_pytorch(query, *given) | {"twice": lambda: 2 * torch.ones_like(query)},
    )
    bench = decode_gpu.Bench("cpu", 1, frozenset({"flex"}))
    made = decode_gpu.contenders(decode_gpu.Shape.parse(decode_gpu.TINY[0]), bench)
    assert "PyTorch, one: products" in made
    assert "PyTorch, one: twice" not in made
    assert "twice is left out: PyTorch, twice is wrong" in capsys.readouterr().err
    monkeypatch.setattr(decode_launch, "attend", lambda inputs: 1.1 * torch.ones_like(inputs.query))
    with pytest.raises(SystemExit, match="is wrong"):
        decode_gpu.main(["--self-check"])


@pytest.mark.long
@given(inputs=calls())
@settings(max_examples=1500)
def test_it_is_as_near_to_the_truth_as_pytorch_at_length(inputs: Inputs):
    assert_close(kernels.attend(inputs, "triton_decode"), inputs)
