"""The Triton kernels of prefill and training, carried out: by the interpreter on a CPU, or by a GPU where there is one. Run by ``test_triton_prefill.py``.

What is right is the reference in float64, differentiated by autograd; how much it may be missed by is what PyTorch's own kernel misses it by in the same dtype, twice.
For the interpreter tiles are small, so that 65 keys are whole, masked and ragged tiles in all orders.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from interpreter import DEVICE, IS_INTERPRETING, IS_ROOMY
from twofold import kernels
from twofold.attention import Attention
from twofold.errors import TwofoldError
from twofold.kernels import Inputs, Mask, Rotation, reference, scaled_dot_product, triton_prefill, triton_prefill_launch
from twofold.kernels.triton_prefill_plan import Tiles
from twofold.positions import NoPositions, RotaryPositions
from twofold.spec import AttentionSpec
from twofold.tie import Tie

# What NumPy says of the infinities that a softmax is made with.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LENGTHS = (1, 15, 16, 17, 63, 65)
SMALL = Tiles(queries=32, keys=32, warps=4, stages=1)
SMALLEST = Tiles(queries=16, keys=16, warps=4, stages=1)
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
Attend = Callable[[Inputs], Tensor]


@dataclass(frozen=True, kw_only=True)
class Call:
    """An attention call, the gradient of its output, and the tiles it has where it is interpreted."""

    inputs: Inputs
    gradient: Tensor
    tiles: Tiles = SMALL

    @property
    def differentiated(self) -> dict[str, Tensor]:
        """What has a gradient."""
        names = ("query", "key", "key_scale") if self.inputs.shares_value else ("query", "key", "value", "key_scale")
        named = {name: getattr(self.inputs, name) for name in names}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def changed(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call of other streams and tables."""
        inputs, streams = self.inputs, {name: change(tensor) for name, tensor in self.differentiated.items()}
        streams.setdefault("value", streams["key"])
        rotation = inputs.key_rotation
        if rotation is not None:
            tables = {"cosine": change(rotation.cosine), "sine": change(rotation.sine)}
            rotation = Rotation(**tables, distance=rotation.distance)
        inputs = replace(inputs, **streams, key_rotation=rotation)
        return replace(self, inputs=inputs, gradient=change(self.gradient))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    if IS_INTERPRETING:
        monkeypatch.setattr(triton_prefill_launch, "tiles_of", lambda *_, **__: SMALL)


def results(attend: Attend, call: Call) -> dict[str, Tensor]:
    """The output and all gradients."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in call.differentiated.items()}
    shared = {"value": leaves["key"]} if call.inputs.shares_value else {}
    with pytest.MonkeyPatch.context() as patch:
        if IS_INTERPRETING:
            patch.setattr(triton_prefill_launch, "tiles_of", lambda *_, **__: call.tiles)
        output = attend(replace(call.inputs, **leaves, **shared))
        gradients = torch.autograd.grad(output, list(leaves.values()), call.gradient)
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def exact(call: Call) -> dict[str, Tensor]:
    return results(reference.attend, call.changed(Tensor.double))


def by_pytorch(inputs: Inputs) -> Tensor:
    """PyTorch's fused kernel, on keys that were made ready for it: it has no groups on a CPU."""
    group = inputs.query.shape[1] // inputs.key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (inputs.whole_key, inputs.value))
    with sdpa_kernel(FUSED, set_priority=True):
        return scaled_dot_product.attend(replace(inputs, key=key, value=value, key_scale=None, key_rotation=None))


def size_of(x: Tensor) -> float:
    """Root mean square."""
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


def rounding_of(call: Call, wanted: dict[str, Tensor]) -> float:
    """What no kernel can be nearer than: numbers that are rounded once, and with them, where keys are made, logits."""
    inputs, largest = call.inputs, max(map(size_of, wanted.values()))
    eps, width = torch.finfo(inputs.query.dtype).eps, inputs.query.shape[-1] ** 0.5
    key = inputs.whole_key
    logits = inputs.scale * size_of(inputs.query) * size_of(key) * width
    # Where one key has all of the weight, dO · V - dO · O is 0, and what is left of it is the rounding of two sums, or of O.
    sums = (
        size_of(call.gradient) * size_of(inputs.value) * width * inputs.scale * max(size_of(inputs.query), size_of(key))
    )
    if inputs.query.dtype == torch.float32:
        return 8 * eps * (1 + logits) * max(largest, sums)
    return eps / 4 * max(largest * (1 if key is inputs.key else 1 + logits), sums)


def assert_near(found: dict[str, Tensor], call: Call) -> None:
    """As near to the truth as PyTorch, within a factor of 2."""
    wanted, theirs = exact(call), results(by_pytorch, call)
    rounding = rounding_of(call, wanted)
    for name, one in wanted.items():
        assert found[name].shape == one.shape
        assert found[name].dtype == call.inputs.query.dtype
        allowed = 2 * max(size_of(theirs[name].double() - one), rounding)
        assert size_of(found[name].double() - one) <= allowed, name


def normal(seed: int, dtype: torch.dtype = torch.float32) -> Callable[..., Tensor]:
    """A function that draws tensors of a shape."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def call_of(
    seed: int = 0, *, queries: int = 40, keys: int = 40, dtype: torch.dtype = torch.float32, **given: object
) -> Call:
    """Two sequences, two heads that read one KV head, one stream."""
    draw = normal(seed, dtype)
    query, key, gradient = draw(2, 2, queries, 16), draw(2, 1, keys, 16), draw(2, 2, queries, 16)
    given = {"mask": Mask(causal=True), "scale": 0.25, "value": key} | given
    return Call(inputs=Inputs(query=query, key=key, **given), gradient=gradient)


def rotation_of(rows: int, pairs: int = 8, distance: int = 8, dtype: torch.dtype = torch.float32) -> Rotation:
    angles = normal(7, torch.float64)(rows, pairs) * 3
    return Rotation(cosine=angles.cos().to(dtype), sine=angles.sin().to(dtype), distance=distance)


# Against the reference


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Any heads, lengths, dims, turning, masks, sizes of logits and tiles, in any dtype."""
    dtype = draw(st.sampled_from(DTYPES))
    numbers = normal(draw(st.integers(0, 2**31)), dtype)
    batch, kv_heads, group = draw(st.sampled_from([(1, 1, 1), (2, 3, 1), (1, 2, 3), (2, 1, 4)]))
    num_keys, head_dim = draw(st.sampled_from(LENGTHS)), draw(st.sampled_from([16, 24, 40]))
    num_queries = draw(st.sampled_from([num_keys, num_keys, 1, 17]).filter(lambda count: count <= num_keys))
    key = numbers(batch, kv_heads, num_keys, head_dim)
    half = head_dim // 2
    pairs = draw(st.sampled_from([None, None, (half, half), (4, 4), (4, half), (3, 5)]))
    bits = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    key_mask, segments = torch.rand(2, batch, num_keys, generator=bits).to(DEVICE)
    documents = (segments < 0.1).long().cumsum(dim=1)
    if draw(st.integers(0, 3)) == 0:  # documents in any order, and one in several pieces
        documents = (documents * 7) % 3
    mask = Mask(
        causal=draw(st.booleans()),
        window_tokens=draw(st.sampled_from([0, 0, 1, 9, 40, 100])),
        key_mask=key_mask < draw(st.sampled_from([0.2, 0.8])) if draw(st.integers(0, 2)) == 0 else None,
        segments=documents if draw(st.integers(0, 2)) == 0 else None,
    )
    return Call(
        inputs=Inputs(
            query=numbers(batch, kv_heads * group, num_queries, head_dim) * draw(st.sampled_from([1, 1, 4])),
            key=key,
            value=key if draw(st.integers(0, 3)) else numbers(*key.shape),
            mask=mask,
            scale=draw(st.sampled_from([head_dim**-0.5, 1.0])),
            key_rotation=None if pairs is None else rotation_of(num_keys, *pairs, dtype),
            key_scale=numbers(head_dim).abs() + 0.5 if draw(st.integers(0, 3)) == 0 else None,
        ),
        gradient=numbers(batch, kv_heads * group, num_queries, head_dim),
        tiles=Tiles(
            queries=draw(st.sampled_from([16, 32, 64])), keys=draw(st.sampled_from([16, 32, 64])), warps=4, stages=1
        ),
    )  # fmt: skip


@given(call=calls())
@settings(
    max_examples=settings.default.max_examples * 3 // 10, phases=(Phase.reuse, Phase.generate)
)  # to shrink takes minutes
def test_it_is_as_near_to_the_truth_as_pytorch(call: Call):
    assert_near(results(triton_prefill.attend, call), call)


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.bfloat16, "plain"),
        (torch.bfloat16, "turned"),
        (torch.bfloat16, "turned in part"),
        (torch.bfloat16, "two tensors"),
        (torch.float16, "plain"),
        (torch.float16, "turned"),
    ],
)
def test_over_many_calls_its_errors_are_those_of_pytorch(dtype: torch.dtype, kind: str):
    """One call's errors are few numbers; those of several, taken together, tell what is owed to chance from what is not."""
    ours, theirs = dict[str, float](), dict[str, float]()
    for seed in range(4):
        pairs = {"turned": 8, "turned in part": 4}.get(kind, 0)
        rotation = rotation_of(40, pairs, dtype=dtype) if pairs else None
        call = call_of(100 + seed, dtype=dtype, key_rotation=rotation)
        if kind == "two tensors":
            call = replace(call, inputs=replace(call.inputs, value=normal(seed, dtype)(2, 1, 40, 16)))
        wanted = exact(call)
        for errors, found in ((ours, results(triton_prefill.attend, call)), (theirs, results(by_pytorch, call))):
            for name, one in wanted.items():
                errors[name] = errors.get(name, 0.0) + size_of(found[name].double() - one) ** 2
    for name, error in ours.items():
        assert error**0.5 <= 1.25 * theirs[name] ** 0.5, name


def test_what_is_not_near_is_noticed():
    """Liars: another scale, a gradient whose part by way of the values is missing, a rotation the other way round."""
    call = call_of(key_rotation=rotation_of(40))
    found = results(triton_prefill.attend, call)
    assert_near(found, call)
    rotation = call.inputs.key_rotation
    back = Rotation(cosine=rotation.cosine, sine=-rotation.sine, distance=rotation.distance)
    lies = [replace(call.inputs, scale=0.2501), replace(call.inputs, key_rotation=back)]
    wrong = [results(triton_prefill.attend, replace(call, inputs=lie)) for lie in lies]
    by_key_alone = results(lambda inputs: reference.attend(replace(inputs, value=inputs.value.detach())), call)
    for one in (*wrong, {**found, "key": by_key_alone["key"]}):
        with pytest.raises(AssertionError):
            assert_near(one, call)


@pytest.mark.parametrize("size", [30.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_huge_logits(dtype: torch.dtype, size: float):
    call = call_of(1, dtype=dtype)
    call = replace(call, inputs=replace(call.inputs, query=call.inputs.query * size))
    assert float((call.inputs.query @ call.inputs.key.repeat_interleave(2, 1).mT).max()) > 10 * size
    assert_near(results(triton_prefill.attend, call), call)


def test_equal_logits_are_a_mean():
    call = call_of(2)
    same = call.inputs.key[:, :, :1].expand(-1, -1, 40, -1)
    value = call.inputs.key
    found = triton_prefill.attend(replace(call.inputs, key=same, value=value))
    mean = value.cumsum(dim=2) / torch.arange(1, 41, device=DEVICE)[:, None]
    torch.testing.assert_close(found, mean.repeat_interleave(2, dim=1))
    for scale in (0.0, -0.25):
        given_inputs = replace(call.inputs, scale=scale)
        torch.testing.assert_close(triton_prefill.attend(given_inputs), reference.attend(given_inputs))


# Rows, and what they must not see


@pytest.mark.parametrize("shares", [True, False])
def test_a_query_that_sees_no_key_gets_zero_and_gives_none(shares: bool):
    key_mask = torch.ones(2, 40, dtype=torch.bool, device=DEVICE)
    key_mask[0, :20], key_mask[1] = False, False
    call = call_of(3, mask=Mask(causal=True, key_mask=key_mask), key_rotation=rotation_of(40))
    if not shares:
        call = replace(call, inputs=replace(call.inputs, value=call.inputs.key.clone()))
    found = results(triton_prefill.attend, call)
    for name, tensor in found.items():
        assert tensor.isfinite().all(), name
        assert not tensor[1].any(), name
        assert not tensor[0, :, :20].any(), name
        assert tensor[0, :, 21:].any(), name


def test_what_is_no_number_stays_in_its_sequence():
    call = call_of(4, mask=Mask(causal=False), key_rotation=rotation_of(40))
    clean = results(triton_prefill.attend, call)
    for name in ("query", "key", "gradient"):
        spoiled = call.gradient.clone() if name == "gradient" else getattr(call.inputs, name).clone()
        spoiled[1, 0, 3, 5] = torch.nan
        other = {"gradient": spoiled} if name == "gradient" else {
            "inputs": replace(call.inputs, **{name: spoiled}, **({"value": spoiled} if name == "key" else {}))
        }  # fmt: skip
        found = results(triton_prefill.attend, replace(call, **other))
        assert any(tensor[1].isnan().any() for tensor in found.values())
        for kind, tensor in found.items():
            assert torch.equal(tensor[0], clean[kind][0])


@pytest.mark.parametrize("hidden", ["window", "documents", "later"])
def test_tiles_in_which_nothing_is_visible_are_not_visited(hidden: str):
    """Keys that are no numbers would spoil what reads them, even at a weight of zero."""
    documents = torch.arange(64, device=DEVICE).repeat(2, 1) // 32
    mask = {
        "window": Mask(causal=True, window_tokens=9),
        "documents": Mask(causal=False, segments=documents),
        "later": Mask(causal=True),
    }[hidden]
    call = replace(call_of(5, queries=64, keys=64, mask=mask), tiles=SMALLEST)
    clean = results(triton_prefill.attend, call)
    key, query, gradient = call.inputs.key.clone(), call.inputs.query.clone(), call.gradient.clone()
    far = slice(48, 64) if hidden == "later" else slice(0, 16)
    for tensor in (key, query, gradient):
        tensor[:, :, far] = torch.nan
    found = results(
        triton_prefill.attend,
        replace(call, inputs=replace(call.inputs, query=query, key=key, value=key), gradient=gradient),
    )
    near = slice(0, 32) if hidden == "later" else slice(32, 64)
    if IS_INTERPRETING:
        assert torch.equal(found["output"][:, :, near], clean["output"][:, :, near])
        if hidden != "later":
            assert torch.equal(found["key"][:, :, near], clean["key"][:, :, near])
    assert found["output"][:, :, far].isnan().all()


def test_packed_documents_are_as_if_alone():
    lengths = (7, 1, 25, 32)
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).to(DEVICE).repeat(2, 1)
    call = call_of(6, queries=65, keys=65, mask=Mask(causal=True, segments=documents), key_rotation=rotation_of(65))
    whole, rotation, begin = results(triton_prefill.attend, call), call.inputs.key_rotation, 0
    for length in lengths:
        part = slice(begin, begin + length)
        tables = {"cosine": rotation.cosine[part], "sine": rotation.sine[part]}
        key = call.inputs.key[:, :, part]
        alone = Call(
            inputs=replace(
                call.inputs, query=call.inputs.query[:, :, part], key=key, value=key,
                key_rotation=Rotation(**tables, distance=8), mask=Mask(causal=True),
            ),
            gradient=call.gradient[:, :, part],
        )  # fmt: skip
        for name, tensor in results(triton_prefill.attend, alone).items():
            torch.testing.assert_close(tensor, whole[name][:, :, part], rtol=1e-5, atol=1e-5)
        begin += length


def test_chunks_of_queries_are_rows_of_the_whole():
    call = call_of(8, queries=65, keys=65, mask=Mask(causal=True, window_tokens=30), key_rotation=rotation_of(65))
    whole, rotation = triton_prefill.attend(call.inputs), call.inputs.key_rotation
    for start, end in ((0, 17), (17, 50), (50, 65)):
        tables = {"cosine": rotation.cosine[:end], "sine": rotation.sine[:end]}
        key = call.inputs.key[:, :, :end]
        chunk = replace(
            call.inputs, query=call.inputs.query[:, :, start:end], key=key, value=key,
            key_rotation=Rotation(**tables, distance=8),
        )  # fmt: skip
        torch.testing.assert_close(triton_prefill.attend(chunk), whole[:, :, start:end], rtol=1e-5, atol=1e-5)


def test_each_text_may_turn_at_positions_of_its_own():
    tables = [rotation_of(41) for _ in range(2)]
    parts = [slice(0, 40), slice(1, 41)]
    cosine, sine = (
        torch.stack([getattr(table, name)[part] for table, part in zip(tables, parts, strict=True)])[:, None]
        for name in ("cosine", "sine")
    )
    call = call_of(9, key_rotation=Rotation(cosine=cosine, sine=sine, distance=8))
    assert_near(results(triton_prefill.attend, call), call)


# How tensors lie in memory


def test_any_strides_will_do():
    call = call_of(
        10, key_rotation=rotation_of(40), mask=Mask(causal=True, key_mask=torch.ones(2, 40, device=DEVICE) > 0)
    )
    wanted = results(triton_prefill.attend, call)
    changes = {
        "as projections give them": lambda x: x.transpose(-2, -3).contiguous().transpose(-2, -3) if x.ndim == 4 else x,
        "columns apart": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
        "parts of a wider one": lambda x: torch.cat((x, x + 1), dim=-1)[..., : x.shape[-1]],
        "of odd alignment": lambda x: torch.cat((x[..., :1], x), dim=-1)[..., 1:],
    }
    for kind, change in changes.items():
        other = call.changed(change)
        assert other.inputs.query.stride() != call.inputs.query.stride(), kind
        mask = replace(call.inputs.mask, key_mask=call.inputs.mask.key_mask.mT.contiguous().mT)
        found = results(triton_prefill.attend, replace(other, inputs=replace(other.inputs, mask=mask)))
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), (kind, name)
    summed = replace(call, gradient=torch.ones((), device=DEVICE).expand_as(call.gradient))
    ones = replace(call, gradient=torch.ones_like(call.gradient))
    assert torch.equal(results(triton_prefill.attend, summed)["key"], results(triton_prefill.attend, ones)["key"])


def test_nothing_beyond_the_tensors_is_read_or_written(monkeypatch: pytest.MonkeyPatch):
    """Tensors within larger ones of what is no number, on all sides; so are outputs and gradients."""
    call = call_of(11, queries=17, keys=33, key_rotation=rotation_of(33, 4, 8), key_scale=normal(0)(16).abs())
    documents = torch.arange(33, device=DEVICE).repeat(2, 1) // 9
    call = replace(call, inputs=replace(call.inputs, mask=Mask(causal=True, segments=documents)))
    wanted, guards = results(triton_prefill.attend, call), []

    def guarded(x: Tensor, fill: float = torch.nan) -> Tensor:
        room = x.new_full([size + 2 for size in x.shape], fill)
        inside = room[tuple(slice(1, -1) for _ in x.shape)]
        inside.copy_(x)
        guards.append((room, inside, fill))
        return inside

    monkeypatch.setattr(triton_prefill_launch, "empty_heads", lambda like: guarded(torch.zeros_like(like)))
    inside = call.changed(guarded)
    mask = Mask(causal=True, segments=guarded(documents, fill=2))
    found = results(triton_prefill.attend, replace(inside, inputs=replace(inside.inputs, mask=mask)))
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    assert len(guards) > 8
    for room, inner, fill in guards:
        whole = room.clone()
        whole[tuple(slice(1, -1) for _ in inner.shape)] = fill
        assert torch.equal(whole.nan_to_num(7.0), torch.full_like(room, fill).nan_to_num(7.0))


@pytest.mark.skipif(not IS_ROOMY, reason="this GPU has not so much memory")
def test_tensors_may_be_larger_than_32_bits_can_count():
    """Rows, heads and sequences lie far apart in room of which no more is ever touched."""
    call = call_of(22, dtype=torch.bfloat16, key_rotation=rotation_of(40))
    wanted = results(triton_prefill.attend, call)
    for dim, stride in ((0, 2**31), (1, 2**31), (2, 2**31 // 31 + 16)):

        def far(x: Tensor, dim: int = dim, stride: int = stride) -> Tensor:
            strides = [stride if index == dim else own for index, own in enumerate(x.stride())]
            room = torch.empty(stride * (x.shape[dim] - 1) + x.numel(), dtype=x.dtype, device=DEVICE)
            return room.as_strided(x.shape, strides).copy_(x)

        query, key, gradient = far(call.inputs.query), far(call.inputs.key), far(call.gradient)
        apart = Call(inputs=replace(call.inputs, query=query, key=key, value=key), gradient=gradient)
        found = results(triton_prefill.attend, apart)
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), (dim, name)


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 0, 0)])
def test_there_may_be_nothing_to_do(shape: tuple[int, int, int]):
    batch, queries, keys = shape
    query, key = torch.zeros(batch, 4, queries, 16, device=DEVICE), torch.zeros(batch, 2, keys, 16, device=DEVICE)
    inputs = Inputs(query=query, key=key, value=key, mask=Mask(causal=True), scale=1.0)
    found = results(triton_prefill.attend, Call(inputs=inputs, gradient=torch.zeros_like(query)))
    assert found["output"].shape == found["query"].shape == query.shape
    assert torch.equal(found["key"], torch.zeros_like(key))


# Autograd, compilers and other programs


def loss_of(attend: Attend, call: Call) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda query, key: (attend(replace(call.inputs, query=query, key=key, value=key)) * call.gradient).sum()


def saved_bytes(call: Call) -> int:
    """What autograd keeps between the two passes."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in call.differentiated.items()}
    leaves.setdefault("value", leaves["key"])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        triton_prefill.attend(replace(call.inputs, **leaves))
    return sum(storages.values())


def test_training_keeps_one_tensor_less():
    """Of K = V: query, stream, output, and a number for each query; nothing that is turned."""
    call = call_of(12, key_rotation=rotation_of(40))
    two = replace(call, inputs=replace(call.inputs, value=call.inputs.key.clone()))
    query, key = call.inputs.query, call.inputs.key
    tables = 2 * call.inputs.key_rotation.cosine.nbytes
    assert saved_bytes(two) - saved_bytes(call) == key.nbytes
    assert saved_bytes(call) == 2 * query.nbytes + key.nbytes + query.nbytes // 16 + tables


def test_only_gradients_that_are_wanted_are_made(monkeypatch: pytest.MonkeyPatch):
    call, asked = call_of(13), []
    run = triton_prefill.run_backward
    monkeypatch.setattr(
        triton_prefill, "run_backward", lambda *given, wants: asked.append(wants) or run(*given, wants=wants)
    )
    wanted = results(triton_prefill.attend, call)
    for index, name in enumerate(("query", "key")):
        leaf = call.differentiated[name].clone().requires_grad_()
        given = {name: leaf} | ({"value": leaf} if name == "key" else {})
        output = triton_prefill.attend(replace(call.inputs, **given))
        assert torch.equal(torch.autograd.grad(output, leaf, call.gradient)[0], wanted[name])
        assert asked[-1] == (index == 0, index == 1)
    with torch.no_grad():
        assert torch.equal(triton_prefill.attend(call.inputs), wanted["output"])


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(
    ("way", "again"), [("eager", True), ("compiled", False), ("compiled", True), ("compiled for any length", False)]
)
def test_compilers_and_checkpoints_see_one_operation(way: str, again: bool):
    call = call_of(14, key_rotation=rotation_of(40))
    loss = plain = loss_of(triton_prefill.attend, call)
    if again:
        loss = lambda query, key: checkpoint(plain, query, key, use_reentrant=False)  # noqa: E731
    if way != "eager":
        loss = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=way.endswith("length") or None)
    leaves = [call.inputs.query.clone().requires_grad_(), call.inputs.key.clone().requires_grad_()]
    found, wanted = torch.autograd.grad(loss(*leaves), leaves), results(triton_prefill.attend, call)
    assert torch.equal(found[0], wanted["query"])
    assert torch.equal(found[1], wanted["key"])
    with torch.no_grad():
        torch.testing.assert_close(loss(*leaves), (wanted["output"] * call.gradient).sum())


def test_the_operations_are_what_they_say():
    call = call_of(15, key_rotation=rotation_of(40))
    rotation = call.inputs.key_rotation
    streams = (call.inputs.query, call.inputs.key, None, None, rotation.cosine[None], rotation.sine[None], None, None)
    numbers = {"scale": 0.25, "causal": True, "window_tokens": 0, "distance": 8}
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(triton_prefill._forward_op, streams, numbers, test_utils=utilities)
    output, logarithm = triton_prefill._forward_op(*streams, **numbers)
    flags = {"wants_query": True, "wants_stream": True}
    given = (call.gradient, output, logarithm, *streams)
    torch.library.opcheck(triton_prefill._backward_op, given, flags | numbers, test_utils=utilities)


@pytest.mark.parametrize("packed", [False, True])
def test_many_models_are_one_program(packed: bool):
    draw, count = normal(16), 2
    queries, keys = draw(count, 2, 2, 20, 16), draw(count, 2, 1, 20, 16)
    documents = (draw(count, 2, 20) > 1).long().cumsum(dim=2)
    tables = rotation_of(20)

    def loss(query: Tensor, key: Tensor, segments: Tensor | None = None) -> Tensor:
        mask = Mask(causal=True, segments=segments)
        inputs = Inputs(query=query, key=key, value=key, mask=mask, scale=0.25, key_rotation=tables)
        return triton_prefill.attend(inputs).square().sum()

    given = (queries, keys, documents) if packed else (queries, keys)
    found = vmap(grad(loss, argnums=(0, 1)))(*given)
    for index in range(count):
        one = grad(loss, argnums=(0, 1))(*(x[index] for x in given))
        for mapped, single in zip(found, one, strict=True):
            assert torch.equal(mapped[index], single)
    shared = vmap(loss, in_dims=(0, None))(queries, keys[0])
    torch.testing.assert_close(shared, torch.stack([loss(query, keys[0]) for query in queries]))


def test_second_derivatives_are_refused():
    call = call_of(17)
    query = call.inputs.query.clone().requires_grad_()
    (first,) = torch.autograd.grad(
        triton_prefill.attend(replace(call.inputs, query=query)).sum(), query, create_graph=True
    )
    with pytest.raises(TwofoldError, match="use backend='reference' for second derivatives"):
        first.sum().backward()


def test_autocast_is_as_for_pytorchs_own():
    call = call_of(18)
    with torch.autocast(DEVICE, torch.bfloat16):
        output = triton_prefill.attend(call.inputs)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, triton_prefill.attend(call.changed(Tensor.bfloat16).inputs))


# Layers


@pytest.mark.parametrize(
    ("tie", "positions"),
    [
        ("(Q, K=V)", NoPositions()),
        ("(Q, K=V)", RotaryPositions()),
        ("(Q, K=V)", RotaryPositions(rotate="stream")),
        ("2V = -3K", RotaryPositions(fraction=0.5)),
        ("(Q=K=V)", RotaryPositions()),
        ("(Q, K, V)", RotaryPositions()),
    ],
)
def test_a_layer_is_what_it_is_with_the_reference(tie: str, positions: object):
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2 if tie == "(Q=K=V)" else 1, "head_dim": 16}
    spec = AttentionSpec(tie=Tie.parse(tie), hidden_size=11, causal=True, positions=positions, qk_norm=True, **heads)
    layers = [Attention(spec, backend=name).to(DEVICE) for name in (triton_prefill.NAME, "reference")]
    layers[1].load_state_dict(layers[0].state_dict())
    states = normal(19)(2, 33, 11)
    documents = torch.arange(33, device=DEVICE).repeat(2, 1) // 20
    outputs = [layer(states, segments=documents) for layer in layers]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    gradients = [
        torch.autograd.grad(output.square().sum(), [*layer.parameters()])
        for output, layer in zip(outputs, layers, strict=True)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_layer_takes_it_by_itself(monkeypatch: pytest.MonkeyPatch):
    """Under autocast too, whose tensors are of bfloat16 where the layer's are not."""
    spec = AttentionSpec(
        tie=Tie.parse("(Q, K=V)"), hidden_size=16, causal=True, positions=RotaryPositions(),
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    layer, states, calls = Attention(spec).to(DEVICE), normal(21)(2, 40, 16), []
    run = triton_prefill.run_forward
    monkeypatch.setattr(triton_prefill, "run_forward", lambda *given: calls.append(given) or run(*given))
    gradients = []
    for loss_of_layer in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = loss_of_layer(states).square().sum()
        gradients.append(torch.autograd.grad(loss, [*layer.parameters()]))
        assert len(calls) == len(gradients)
    assert all(map(torch.equal, *gradients))


def test_auto_takes_it_where_it_pays():
    call = call_of(20, dtype=torch.bfloat16)
    assert kernels.choose(call.inputs.problem).name == triton_prefill.NAME
    two = replace(call.inputs, value=call.inputs.key.clone())
    choice = kernels.choose(two.problem)
    assert choice.refused[triton_prefill.NAME] == "keys and values are two tensors"
    assert kernels.choose(two.problem, triton_prefill.NAME).why == "asked for"
    torch.testing.assert_close(kernels.attend(two, triton_prefill.NAME), kernels.attend(two), rtol=0.05, atol=0.02)


# The benchmark


@pytest.mark.skipif(not IS_INTERPRETING, reason="on a GPU it takes its time")
def test_the_benchmark_of_training_works(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """On tiny shapes; no time is judged. A kernel that computes something else is noticed before it is timed."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    benchmark = importlib.import_module("train_gpu")
    benchmark.main(["--self-check", "--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert all(list(row) == ["name", "value", "unit", "goal", "met"] and row["value"] > 0 for row in rows.values())
    for kind in ("v = k", "two tensors", "turned"):
        assert f"1x1x2x16x40: time, ours, {kind}" in rows
        assert f"1x1x2x16x40: speed, ours, {kind} / math, {kind}" in rows
    for tie in ("(Q, K, V)", "(Q, K=V)", "(Q, K=V), sdpa"):
        assert rows[f"300M: speed, ours {tie} / plain"]["unit"] == "ratio"
        assert rows[f"300M: positions a second, ours {tie}"]["unit"] == "tokens/s"
    monkeypatch.setattr(
        benchmark, "CANDIDATES", dict.fromkeys(benchmark.CANDIDATES, ((16,), (16, 32), (4,), (1,), (0,)))
    )
    benchmark.main(["--self-check", "--tiles"])
    table = capsys.readouterr().out
    assert table.count("as chosen") == table.count("keys=32") == 6
    other = lambda inputs: triton_prefill.attend(replace(inputs, scale=0.3))  # noqa: E731
    shape, bench = benchmark.Shape.parse("1x1x2x16x40"), benchmark.Bench("cpu", 1)
    with pytest.raises(AssertionError, match="not close"):
        benchmark.check(other, shape, "cpu", {})
    good = benchmark.contenders(bench)
    monkeypatch.setattr(benchmark, "contenders", lambda _: good | {"wrong, v = k": (other, {})})
    names = [row["name"] for row in benchmark.attention_rows(shape, bench)]
    assert not any("wrong" in name for name in names)
    assert "wrong, v = k is left out" in capsys.readouterr().err
