"""Decoding on a GPU: a Triton kernel that reads one tensor once, as keys and as values, for a few queries over many keys.

The keys of a sequence are shared out among programs, and what these leave is added up (see ``triton/decode.py``). Two tensors are read by the same code. Keys may be
floats or 8-bit codes, lie in a row or in pages, and turn as they are read. How a call is shared out follows from its shapes alone and nothing waits for the
device, so that a call can be captured in a CUDA graph; for ``torch.compile`` it is one operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.kernels.inputs import Inputs, Mask, Problem, Rotation
from twofold.kernels.triton import has_float8, why_not
from twofold.lazy import Lazy

if TYPE_CHECKING:
    from twofold.kernels.triton import decode_launch
else:
    decode_launch = Lazy("twofold.kernels.triton.decode_launch")

NAME = "triton_decode"

MAX_QUERIES = 16
"""For more, a kernel that takes queries by the tile reads keys less often."""
MAX_HEAD_DIM = 512
MAX_EXTENSION_DIM = 128
FLOATS = ("bfloat16", "float16")
CODES = ("int8", "float8_e4m3fn", "float8_e5m2")


def supports(problem: Problem) -> str:
    """Why a problem cannot be served; empty: it can."""
    if reason := why_not(problem.device):
        return reason
    if problem.dtype not in FLOATS or problem.key_dtype not in (problem.dtype, *CODES):
        return f"queries of {problem.dtype} and keys of {problem.key_dtype}: it has {' and '.join(FLOATS)}, and keys of {', '.join(CODES)}"
    reasons = {
        "it has no gradient": problem.needs_gradient,
        "it reads one document at a time": problem.has_segments,
        f"it is for up to {MAX_QUERIES} queries over keys of before": problem.num_queries > MAX_QUERIES
        or problem.num_queries == problem.num_keys > 1,
        f"it is for heads of up to {MAX_HEAD_DIM} dimensions": problem.head_dim > MAX_HEAD_DIM,
        f"it is for a shared key of up to {MAX_EXTENSION_DIM} dimensions": problem.key_extension_dim
        > MAX_EXTENSION_DIM,
        "other programs, which a model is exported for, do not know it": torch.compiler.is_exporting(),
        "this GPU does not know float8_e4m3fn": problem.key_dtype == "float8_e4m3fn" and not has_float8(problem.device),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def attend(inputs: Inputs) -> Tensor:
    """[B, H, T, D]. Raises TwofoldError for tensors that do not fit together."""
    check(inputs)
    if not torch.compiler.is_compiling():
        return decode_launch.attend(inputs)
    others = _others(inputs)
    rotation = inputs.key_rotation
    distance = 0 if rotation is None else rotation.distance
    value = None if inputs.shares_value else inputs.value
    counts = [int(inputs.mask.causal), inputs.mask.window_tokens, distance]
    return _operator(inputs.query, inputs.key, value, others, counts, [inputs.scale, inputs.soft_cap])


# What is refused


def check(inputs: Inputs) -> None:
    """Raise TwofoldError, one sentence, for tensors that do not fit together or that the kernel does not know."""
    query, key, value, pages = inputs.query, inputs.key, inputs.value, inputs.pages
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _require(tensor.ndim == 4, f"{name} has the shape {tuple(tensor.shape)}: it has four dimensions")
    if reason := supports(inputs.problem):
        raise TwofoldError(f"The {NAME} backend cannot serve this: {reason}; use backend='auto'.")
    batch, heads, num_queries, _ = query.shape
    kv_heads, head_dim, num_keys = key.shape[1], key.shape[3], inputs.num_keys
    _require(heads % kv_heads == 0, f"{heads} query heads do not share {kv_heads} KV heads: each has as many")
    _require(value.shape[3] <= MAX_HEAD_DIM, f"values have {value.shape[3]} dimensions: it is for up to {MAX_HEAD_DIM}")
    rows = key.shape[0] if pages is not None else batch
    extension_dim = 0 if inputs.key_extension is None else inputs.key_extension.shape[-1]
    mask, rotation = inputs.mask, inputs.key_rotation
    whole = (torch.int32, torch.int64)
    _fits("query", query, (batch, heads, num_queries, head_dim + extension_dim))
    _fits("key", key, (rows, kv_heads, key.shape[2], head_dim))
    _fits("value", value, (rows, kv_heads, key.shape[2], value.shape[3]), (key.dtype,))
    _fits("key_scale", inputs.key_scale, (head_dim,))
    _fits("key_extension", inputs.key_extension, (batch, 1, num_keys, extension_dim), (query.dtype,))
    _fits("sinks", inputs.sinks, (heads,))
    _fits("pages", pages, (batch, None), whole)
    _fits("lengths", mask.lengths, (batch,), whole)
    _fits("key_mask", mask.key_mask, (batch, num_keys), (torch.bool,))
    for name, positions, count in zip(("queries", "keys"), mask.positions or (), (num_queries, num_keys), strict=False):
        _fits(f"positions of {name}", positions, (count,), whole)
    _check_broadcast("bias", inputs.bias, (batch, heads, num_queries, num_keys))
    for name, scales, dim in (
        ("key_scales", inputs.key_scales, head_dim),
        ("value_scales", inputs.value_scales, value.shape[3]),
    ):
        if scales is not None and scales.ndim == 4 and scales.shape[3] == 1:
            _check_broadcast(name, scales, (rows, kv_heads, key.shape[2], 1), full=2)
        elif scales is not None:
            _check_broadcast(name, scales, (1 if pages is not None else batch, kv_heads, 1, dim), full=3)
    if rotation is not None:
        _check_rotation(rotation, (batch, num_keys, head_dim))
    _check_devices(inputs)


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise TwofoldError(f"The {NAME} backend was given tensors that do not fit together: {reason}.")


def _fits(
    name: str, tensor: Tensor | None, shape: Sequence[int | None], dtypes: Sequence[torch.dtype] | None = None
) -> None:
    if tensor is None:
        return
    fits = tensor.ndim == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=False)
    )
    words = ["any" if size is None else str(size) for size in shape]
    _require(fits, f"{name} has the shape {tuple(tensor.shape)}, and ({', '.join(words)}) is wanted")
    _require(
        dtypes is None or tensor.dtype in dtypes,
        f"{name} has the dtype {tensor.dtype}, and {' or '.join(map(str, dtypes or ()))} is wanted",
    )


def _check_broadcast(name: str, tensor: Tensor | None, shape: Sequence[int], full: int = 4) -> None:
    """Dimensions of one element may stand for all, but not from dimension ``full`` on."""
    if tensor is None:
        return
    sizes = zip(tensor.shape, shape, strict=False)
    fits = tensor.ndim == len(shape) and all(
        size == wanted or (size == 1 and dim < full) for dim, (size, wanted) in enumerate(sizes)
    )
    _require(fits, f"{name} has the shape {tuple(tensor.shape)}, which does not spread to {tuple(shape)}")


def _check_rotation(rotation: Rotation, sizes: tuple[int, int, int]) -> None:
    batch, num_keys, head_dim = sizes
    pairs = rotation.cosine.shape[-1]
    fits = pairs <= rotation.distance <= head_dim - pairs
    _require(fits, f"{pairs} pairs of dimensions {rotation.distance} apart do not lie in a head of {head_dim}")
    for name, table in (("cosine", rotation.cosine), ("sine", rotation.sine)):
        wanted = [(num_keys, pairs), (batch, 1, num_keys, pairs), (1, 1, num_keys, pairs)]
        _require(
            tuple(table.shape) in wanted,
            f"{name} has the shape {tuple(table.shape)}, and {wanted[0]} or {wanted[1]} is wanted",
        )


def _check_devices(inputs: Inputs) -> None:
    device = inputs.query.device
    for tensor in (inputs.key, inputs.value, *_others(inputs)):
        _require(
            tensor is None or tensor.device == device,
            f"one tensor is on {device} and another on {tensor.device if tensor is not None else device}",
        )


# One operator for torch.compile


def _others(inputs: Inputs) -> list[Tensor | None]:
    """The tensors of a call that there need not be, in an order of their own."""
    rotation, mask = inputs.key_rotation, inputs.mask
    return [
        inputs.key_scale,
        inputs.key_extension,
        inputs.bias,
        inputs.sinks,
        inputs.key_scales,
        None if inputs.shares_value else inputs.value_scales,
        inputs.pages,
        mask.key_mask,
        mask.lengths,
        *(mask.positions or (None, None)),
        *((None, None) if rotation is None else (rotation.cosine, rotation.sine)),
        *((rotation and rotation.steady) or (None, None)),
    ]


def _inputs(
    query: Tensor, key: Tensor, value: Tensor | None, others: Sequence[Tensor | None], counts: Sequence[int]
) -> Inputs:
    """A call from what :func:`_others` and :func:`attend` made of it, its scale and cap left out."""
    key_scale, extension, bias, sinks, key_scales, value_scales, pages, key_mask, lengths, *tables = others
    queries, keys, cosine, sine, steady_cosine, steady_sine = tables
    causal, window, distance = counts
    rotation = None
    if cosine is not None and sine is not None:
        steady = None if steady_cosine is None or steady_sine is None else (steady_cosine, steady_sine)
        rotation = Rotation(cosine=cosine, sine=sine, distance=distance, steady=steady)
    positions = None if queries is None or keys is None else (queries, keys)
    return Inputs(
        query=query,
        key=key,
        value=key if value is None else value,
        mask=Mask(causal=bool(causal), window_tokens=window, key_mask=key_mask, positions=positions, lengths=lengths),
        scale=1.0,
        key_scale=key_scale,
        key_extension=extension,
        key_rotation=rotation,
        bias=bias,
        sinks=sinks,
        key_scales=key_scales,
        value_scales=value_scales,
        pages=pages,
    )


@torch.library.custom_op("twofold::triton_decode", mutates_args=())
def _operator(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    others: Sequence[Tensor | None],
    counts: Sequence[int],
    scales: Sequence[float],
) -> Tensor:
    inputs = _inputs(query, key, value, others, counts)
    return decode_launch.attend(replace(inputs, scale=scales[0], soft_cap=scales[1]))


@_operator.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    others: Sequence[Tensor | None],  # noqa: ARG001 (the operator's own)
    counts: Sequence[int],  # noqa: ARG001
    scales: Sequence[float],  # noqa: ARG001
) -> Tensor:
    batch, heads, num_queries, _ = query.shape
    return query.new_empty((batch, num_queries, heads, (key if value is None else value).shape[3])).transpose(1, 2)
