"""How the Triton kernels of prefill and training are started: what they are compiled for, what they are given, and what they write to.

Outputs and gradients lie in memory as [B, T, H, D], so that the layer's heads are joined, and the gradient of a projection is read, without a
copy. Nothing here is differentiable; see :mod:`twofold.kernels.triton_prefill`.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from twofold.kernels.triton import compute_capability
from twofold.kernels.triton_prefill_plan import Plan, Role, Tiles, tiles_of
from twofold.lazy import Lazy

if TYPE_CHECKING:
    from twofold.kernels.triton import prefill, prefill_backward
else:
    prefill, prefill_backward = Lazy("twofold.kernels.triton.prefill"), Lazy("twofold.kernels.triton.prefill_backward")

DOCUMENTS_AT_A_TIME = 1024
# A multiple of the queries of every tile.
PREPARED_ROWS = 128
PREPARED_NUMBERS = 8192
PREPARING_WARPS = 8
# The highest power of two by which weights are held larger in the backward pass: float16 ends at 2^16.
MAX_EXPONENT = 12
# Offsets within a tile, of 128 rows at most, have 32 bits.
MAX_ROW_STRIDE = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a call computes besides its tensors; see :class:`twofold.kernels.inputs.Inputs`."""

    scale: float
    causal: bool
    window_tokens: int
    distance: int


class Streams(NamedTuple):
    """``value`` is None where the key is the value; ``cosine`` and ``sine`` are [1 or B, S, n]."""

    query: Tensor
    key: Tensor
    value: Tensor | None
    key_scale: Tensor | None
    cosine: Tensor | None
    sine: Tensor | None
    key_mask: Tensor | None
    segments: Tensor | None


class Pointers(NamedTuple):
    """What a kernel reads and writes. What a call does not have is never read: the query stands in for it."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_scale: Tensor
    cosine: Tensor
    sine: Tensor
    key_mask: Tensor
    segments: Tensor
    ranges: Tensor
    output: Tensor
    logarithm: Tensor
    gradient: Tensor
    level: Tensor
    delta: Tensor
    d_query: Tensor
    d_key: Tensor
    d_value: Tensor
    d_scale: Tensor


class Strides(NamedTuple):
    """In elements, of all dimensions but the last; of positions, (sequence, position)."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    cosine: tuple[int, ...]
    sine: tuple[int, ...]
    key_mask: tuple[int, ...]
    segments: tuple[int, ...]
    output: tuple[int, ...]
    gradient: tuple[int, ...]
    d_query: tuple[int, ...]
    d_key: tuple[int, ...]
    d_value: tuple[int, ...]


class Sizes(NamedTuple):
    """``heads`` read the keys in groups of ``group``. ``query_rows``: as many as full tiles have, however large."""

    heads: int
    group: int
    num_queries: int
    query_rows: int
    num_keys: int
    window_tokens: int


def empty_heads(like: Tensor) -> Tensor:
    """Like [B, H, T, D], without a number in it, as it lies in memory: [B, T, H, D]."""
    batch, heads, tokens, head_dim = like.shape
    return like.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


def run_forward(streams: Streams, settings: Settings) -> tuple[Tensor, Tensor]:
    """The output [B, H, T, D], and log2 of each query's sum of exponentials [B, H, T] in float32, for the way back."""
    call = _Call(streams, settings)
    output = empty_heads(streams.query)
    logarithm = output.new_empty(output.shape[:3], dtype=torch.float32)
    if output.numel():
        plan, tiles = call.plan("forward")
        pointers, strides = call.arguments(plan, {"output": output, "logarithm": logarithm})
        arguments = (pointers, strides, call.sizes, call.scale_of_base_2, plan)
        launch(prefill.forward, (call.query_blocks(plan),), arguments, **options_of(tiles))
    return output, logarithm


def run_backward(
    streams: Streams, settings: Settings, forward: tuple[Tensor, Tensor, Tensor], *, wants: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key (the stream's, where it is one), value and key_scale; empty where there is none, or it is not among ``wants``.

    ``forward`` is the output's gradient, the output and the logarithms; ``wants`` says whether the query's is wanted, and whether the stream's are.
    """
    call = _Call(streams, settings)
    gradient, output, logarithm = forward
    gradients = empty_gradients(streams, wants)
    if not output.numel() or not any(wants):
        return tuple(one.zero_() for one in gradients)  # type: ignore[return-value]
    d_query, d_key, d_value, d_scale = gradients
    given = {"gradient": _in_rows(gradient), "output": output, "logarithm": logarithm}
    shape = (*logarithm.shape[:2], call.sizes.query_rows)
    given |= {name: logarithm.new_empty(shape) for name in ("level", "delta")}
    plan = call.plan("query_gradient")[0]
    plan = replace(plan, queries=min(PREPARED_ROWS, PREPARED_NUMBERS // plan.columns))
    pointers, strides = call.arguments(plan, given)
    arguments: tuple[Any, ...] = (pointers, strides, call.sizes, (settings.scale, float(call.exponent)), plan)
    grid = (call.sizes.query_rows // plan.queries * logarithm.shape[1] * logarithm.shape[0],)
    launch(prefill_backward.prepare, grid, arguments, num_warps=PREPARING_WARPS)
    scales = (call.scale_of_base_2, settings.scale, 2.0**-call.exponent)
    if wants[0]:
        plan, tiles = call.plan("query_gradient")
        pointers, strides = call.arguments(plan, given | {"d_query": d_query})
        arguments = (pointers, strides, call.sizes, scales, plan)
        launch(prefill_backward.query_gradient, (call.query_blocks(plan),), arguments, **options_of(tiles))
    if wants[1]:
        plan, tiles = call.plan("stream_gradient")
        programs = call.key_blocks(plan)
        of_scale = d_scale.new_empty(programs if plan.scales else 0, d_scale.numel(), dtype=torch.float32)
        made = {"d_key": d_key, "d_value": d_key if plan.shares else d_value, "d_scale": of_scale}
        pointers, strides = call.arguments(plan, given | made, of_keys=True)
        arguments = (pointers, strides, call.sizes, scales, plan)
        launch(prefill_backward.stream_gradient, (programs,), arguments, **options_of(tiles))
        if plan.scales:
            d_scale.copy_(of_scale.sum(dim=0))
    return gradients


def empty_gradients(streams: Streams, wants: tuple[bool, bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the gradients of query, key, value and key_scale."""
    nothing = streams.query.new_empty(0)
    d_query = empty_heads(streams.query) if wants[0] else nothing
    if not wants[1]:
        return d_query, nothing.clone(), nothing.clone(), nothing.clone()
    d_value = nothing.clone() if streams.value is None else empty_heads(streams.value)
    d_scale = nothing.clone() if streams.key_scale is None else torch.empty_like(streams.key_scale)
    return d_query, empty_heads(streams.key), d_value, d_scale


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **options: int) -> None:
    """Start a kernel on the device of its first tensor, which need not be the one in use."""
    (query, *_), *_ = arguments
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        kernel[grid](*arguments, **options)


class _Call:
    """One call's tensors as kernels want them."""

    def __init__(self, streams: Streams, settings: Settings) -> None:
        self.settings = settings
        query, key = _in_rows(streams.query), _in_rows(streams.key)
        value = key if streams.value is None else _in_rows(streams.value)
        mask = None if streams.key_mask is None else streams.key_mask.view(torch.uint8)
        scale = None if streams.key_scale is None else streams.key_scale.contiguous()
        self.streams = streams._replace(query=query, key=key, value=value, key_scale=scale, key_mask=mask)
        heads, kv_heads = query.shape[1], key.shape[1]
        rows = -(-query.shape[2] // PREPARED_ROWS) * PREPARED_ROWS
        self.sizes = Sizes(
            heads=heads,
            group=heads // kv_heads,
            num_queries=query.shape[2],
            query_rows=rows,
            num_keys=key.shape[2],
            window_tokens=settings.window_tokens if settings.window_tokens < key.shape[2] else 0,
        )
        self.shares = streams.value is None

    @property
    def scale_of_base_2(self) -> float:
        """With which exp2 is the exponential of the logits."""
        return self.settings.scale * math.log2(math.e)

    @property
    def exponent(self) -> int:
        """e, by whose power of two weights are held larger on the way back; see prefill_backward. Only float16 ends so soon that it is needed."""
        if self.streams.query.dtype != torch.float16:
            return 0
        return min(max(0, round(-math.log2(self.settings.scale))), MAX_EXPONENT)

    def plan(self, role: Role) -> tuple[Plan, Tiles]:
        """What a kernel is compiled for."""
        query, cosine = self.streams.query, self.streams.cosine
        plan = Plan(
            head_dim=query.shape[3],
            causal=self.settings.causal,
            window=self.sizes.window_tokens > 0,
            key_mask=self.streams.key_mask is not None,
            segments=self.streams.segments is not None,
            shares=self.shares,
            scales=self.streams.key_scale is not None,
            pairs=0 if cosine is None else cosine.shape[-1],
            distance=self.settings.distance,
        )
        tiles = tiles_of(role, plan, itemsize=query.element_size(), capability=_capability(query.device))
        # Whether the last block of queries is full is no matter to a program that has one: prompts of any length share a kernel.
        num_queries = self.sizes.num_queries if role == "stream_gradient" else 1
        return plan.with_tiles(tiles, num_queries), tiles

    def query_blocks(self, plan: Plan) -> int:
        """Programs of a kernel that has tiles of queries."""
        return -(-self.sizes.num_queries // plan.queries) * self.sizes.heads * self.streams.query.shape[0]

    def key_blocks(self, plan: Plan) -> int:
        """Programs of a kernel that has tiles of keys."""
        return -(-self.sizes.num_keys // plan.keys) * self.streams.key.shape[1] * self.streams.query.shape[0]

    def arguments(self, plan: Plan, made: dict[str, Tensor], *, of_keys: bool = False) -> tuple[Pointers, Strides]:
        """What a kernel is given besides its own tensors, ``made``. ``of_keys``: a program has a tile of keys, not of queries."""
        known: dict[str, Tensor | None] = self.streams._asdict() | made
        known["ranges"] = self._ranges(plan.keys if of_keys else plan.queries, of_keys=of_keys)
        pointers = {name: known.get(name) for name in Pointers._fields}
        query = self.streams.query
        given = Pointers(**{name: query if tensor is None else tensor for name, tensor in pointers.items()})
        strides = {}
        for name in Strides._fields:
            tensor = pointers[name]
            is_of_heads = name in ("query", "key", "value", "output", "gradient", "d_query", "d_key", "d_value")
            strides[name] = (0, 0, 0)[: 3 if is_of_heads else 2] if tensor is None else _strides(name, tensor)
        return given, Strides(**strides)

    def _ranges(self, block: int, *, of_keys: bool) -> Tensor | None:
        """For each block of queries (of keys) where the keys (queries) of its documents begin and end, [B, blocks, 2]."""
        segments = self.streams.segments
        if segments is None:
            return None
        queries = segments[:, self.sizes.num_keys - self.sizes.num_queries :]
        own, other = (segments, queries) if of_keys else (queries, segments)
        blocks = -(-own.shape[1] // block)
        ranges = torch.empty(own.shape[0], blocks, 2, dtype=torch.int32, device=own.device)
        sizes = (own.shape[1], other.shape[1])
        arguments = ((own, other), ranges, segments.stride(), sizes, block, DOCUMENTS_AT_A_TIME)
        launch(prefill.ranges_of_documents, (blocks * own.shape[0],), arguments)
        return ranges


def _in_rows(x: Tensor) -> Tensor:
    """The same with the dimensions of a head next to each other, and rows near enough for offsets within a tile, as they nearly always are."""
    return x if x.stride(-1) == 1 and x.stride(-2) < MAX_ROW_STRIDE else x.contiguous()


def _strides(name: str, x: Tensor) -> tuple[int, ...]:
    """0 along dimensions of one element: kernels are not compiled anew for what such a stride happens to be."""
    strides = [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return tuple(strides if name in ("key_mask", "segments") else strides[:-1])


def options_of(tiles: Tiles) -> dict[str, Any]:
    """How Triton compiles and starts a kernel with such tiles."""
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return options | ({"maxnreg": tiles.registers} if tiles.registers else {})


def _capability(device: torch.device) -> int:
    """With which the compute capability begins; the interpreter does as an H100 would."""
    return compute_capability(device)[0] if device.type == "cuda" else 9
