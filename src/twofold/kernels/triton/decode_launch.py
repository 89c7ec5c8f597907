"""From the tensors of a call to the kernels of :mod:`twofold.kernels.triton.decode`: each tensor as its pointer and its strides, in tuples by what they are for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from twofold.kernels.inputs import Inputs
from twofold.kernels.triton import decode, is_interpreting, multiprocessors, shared_bytes
from twofold.kernels.triton_decode_plan import Call, Plan, plan_of

PLANNED_TOKENS = 128
"""A cache that grows is planned for anew after so many tokens, and not with each."""
WIDEST_WINDOW = 1 << 30
"""So many tokens and more are all: a kernel adds a window to a place in 32 bits."""


class Strided(NamedTuple):
    """A tensor as a kernel sees it; the strides are those of all its dimensions, in elements, 0 where it is to be repeated."""

    pointer: Tensor
    strides: tuple[int, ...]


class Held(NamedTuple):
    """What is read by the tile: queries [B, H, T, D + d_r], keys and values [B, G, S, D] or [pages, G, tokens, D], the shared key [B, 1, S, d_r], angles [B, S, pairs]."""

    query: Strided
    key: Strided
    value: Strided | None
    extension: Strided | None
    cosine: Strided | None
    sine: Strided | None


class Beside(NamedTuple):
    """What is read by the number: of channels [B, G, 1, D], of tokens as keys lie, a bias [B, H, T, S], pages [B, P]."""

    channels: Strided | None
    value_channels: Strided | None
    key_scales: Strided | None
    value_scales: Strided | None
    bias: Strided | None
    pages: Strided | None


class Seen(NamedTuple):
    """Which keys a query may see: lengths [B], a mask [B, S], places [T] and [S], and a window in tokens."""

    lengths: Strided | None
    key_mask: Strided | None
    query_places: Strided | None
    key_places: Strided | None
    window: int | None


class Output(NamedTuple):
    """The output [B, H, T, D] with sinks [H], and what parts leave: sums [B·H·T, parts, D], then peaks, then norms [B·H·T, parts]."""

    final: Strided
    sinks: Strided | None
    parts: Tensor | None


class Scales(NamedTuple):
    """Of the logits."""

    scale: float
    soft_cap: float | None


class Fixed(NamedTuple):
    """Numbers that stay while a text grows: Triton compiles a kernel for those of a tuple that are 1, and for multiples of 16."""

    batch: int
    num_queries: int
    kv_heads: int
    group: int
    row_blocks: int
    scales: Scales


def call_of(inputs: Inputs) -> Call:
    """What a kernel is compiled for."""
    rotation, kv_heads, head_dim = inputs.key_rotation, inputs.key.shape[1], inputs.key.shape[3]
    return Call(
        head_dim=head_dim,
        value_dim=inputs.value.shape[3],
        rows=inputs.query.shape[1] // kv_heads * inputs.query.shape[2],
        bits=8 * inputs.key.element_size(),
        shares=inputs.shares_value,
        causal=inputs.mask.causal,
        pairs=0 if rotation is None else rotation.cosine.shape[-1],
        distance=0 if rotation is None else rotation.distance,
        table_bits=0 if rotation is None else 8 * rotation.cosine.element_size(),
        is_steady=rotation is not None and rotation.steady is not None,
        extension_dim=inputs.query.shape[3] - head_dim,
        page=0 if inputs.pages is None else inputs.key.shape[2],
        key_multiple=_multiple(inputs.key, inputs.value),
        table_multiple=16 if rotation is None else _multiple(rotation.cosine, rotation.sine, *(rotation.steady or ())),
        is_compiled=not is_interpreting(),
    )


def _multiple(*tensors: Tensor) -> int:
    """The power of two, up to 16, of which all rows' beginnings are multiples."""
    common = 16
    for tensor in tensors:
        for size, stride in zip(tensor.shape[:-1], tensor.stride(), strict=False):
            common |= stride if size > 1 else 0
    return common & -common


def plan_for(inputs: Inputs) -> tuple[Plan, int]:
    """The plan of a call and the number of parts; see :func:`twofold.kernels.triton_decode_plan.plan_of`."""
    window, num_keys, num_queries = inputs.mask.window_tokens, inputs.num_keys, inputs.query.shape[2]
    if window and inputs.mask.positions is None:
        num_keys = min(num_keys, (1 if inputs.mask.causal else 2) * window + num_queries)
    num_keys = -(-num_keys // PLANNED_TOKENS) * PLANNED_TOKENS
    units = inputs.query.shape[0] * inputs.key.shape[1]
    device = inputs.query.device
    return plan_of(call_of(inputs), units, num_keys, multiprocessors(device), shared_bytes(device))


def attend(inputs: Inputs) -> Tensor:
    """[B, H, T, D], in memory [B, T, H, D]."""
    batch, heads, num_queries, _ = inputs.query.shape
    value_dim = inputs.value.shape[3]
    output = inputs.query.new_empty((batch, num_queries, heads, value_dim)).transpose(1, 2)
    if not output.numel() or not inputs.num_keys:
        return output.zero_()
    (plan, splits), kv_heads = plan_for(inputs), inputs.key.shape[1]
    group = heads // kv_heads
    row_blocks = -(-group * num_queries // plan.rows)
    scales = Scales(float(inputs.scale), float(inputs.soft_cap) or None)
    kept = _output(inputs, output, 0 if plan.is_whole else splits)
    numbers = (Fixed(batch, num_queries, kv_heads, group, row_blocks, scales), inputs.num_keys, splits, plan)
    arguments = (_held(inputs, plan), _beside(inputs), _seen(inputs), kept, *numbers)
    launch(decode.attend, row_blocks * kv_heads * splits * batch, arguments, warps=plan.warps, stages=plan.stages)
    if not plan.is_whole:
        launch(decode.combine, batch * heads * num_queries, (kept, *numbers), warps=8, stages=1)
    return output


def launch(kernel: Any, programs: int, arguments: tuple[Any, ...], *, warps: int, stages: int) -> None:
    """Start a kernel. Tests compile in its place."""
    kernel[(programs,)](*arguments, num_warps=warps, num_stages=stages)


def on_its_device(inputs: Inputs) -> Tensor:
    """:func:`attend`, where the tensors are: Triton starts kernels on the GPU in use, which need not be theirs."""
    device = inputs.query.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return attend(inputs)
    with torch.cuda.device(device):
        return attend(inputs)


def _strided(tensor: Tensor | None) -> Strided | None:
    """With a stride of 0 in each dimension of one element, so that kernels are not compiled anew for what such a stride happens to be."""
    if tensor is None:
        return None
    shape, strides = tensor.shape, tensor.stride()
    if 1 in shape:
        strides = tuple(0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True))
    return Strided(tensor, strides)


def _table(table: Tensor) -> Strided:
    """[S, n] or [B or 1, 1, S, n] as [B, S, n]."""
    first = 0 if table.ndim == 2 or table.shape[0] == 1 else table.stride(0)
    return Strided(table, (first, table.stride(-2), table.stride(-1)))


def _held(inputs: Inputs, plan: Plan) -> Held:
    rotation, cosine, sine = inputs.key_rotation, None, None
    if rotation is not None:
        tables = rotation.steady if plan.is_steady and rotation.steady else (rotation.cosine, rotation.sine)
        cosine, sine = map(_table, tables)
    return Held(
        query=Strided(inputs.query, inputs.query.stride()),
        key=Strided(inputs.key, inputs.key.stride()),
        value=None if inputs.shares_value else _strided(inputs.value),
        extension=_strided(inputs.key_extension),
        cosine=cosine,
        sine=sine,
    )


def _beside(inputs: Inputs) -> Beside:
    value_scales = inputs.key_scales if inputs.shares_value else inputs.value_scales
    of_channels, of_tokens = _by_kind(inputs.key_scales)
    value_channels, of_values = _by_kind(value_scales)
    if inputs.key_scale is not None:
        # the learned scale of a dimension and that of its codes are one
        of_channels = inputs.key_scale * (1 if of_channels is None else of_channels)
        of_channels = of_channels.expand(1, 1, 1, -1) if of_channels.ndim == 1 else of_channels
    return Beside(
        channels=_strided(of_channels),
        value_channels=_strided(value_channels),
        key_scales=_strided(of_tokens),
        value_scales=_strided(of_values),
        bias=_strided(inputs.bias),
        pages=_strided(inputs.pages),
    )


def _by_kind(scales: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Scales of channels, and scales of tokens."""
    if scales is None:
        return None, None
    return (None, scales) if scales.shape[3] == 1 else (scales, None)


def _seen(inputs: Inputs) -> Seen:
    mask = inputs.mask
    key_mask = None if mask.key_mask is None else mask.key_mask.view(torch.uint8)
    queries, keys = (None, None) if mask.positions is None else mask.positions
    return Seen(
        lengths=_strided(mask.lengths),
        key_mask=_strided(key_mask),
        query_places=_strided(queries),
        key_places=_strided(keys),
        window=mask.window_tokens if 0 < mask.window_tokens < WIDEST_WINDOW else None,
    )


def _output(inputs: Inputs, output: Tensor, splits: int) -> Output:
    """With room for what ``splits`` parts leave; 0: there is one, which finishes the output."""
    rows, value_dim = output.numel() // output.shape[3], output.shape[3]
    parts = output.new_empty(rows * splits * (value_dim + 2), dtype=torch.float32) if splits else None
    return Output(final=Strided(output, output.stride()), sinks=_strided(inputs.sinks), parts=parts)
