"""Decoding on a GPU: a Triton kernel that reads one tensor once, as keys and as values, for a few queries over many keys.

The keys of a sequence are shared out among programs, and what these leave is added up (see ``triton/decode.py``). Two tensors are read by the same code. Keys may be
floats or 8-bit codes, lie in a row or in pages, and turn as they are read. How a call is shared out follows from its shapes alone and nothing waits for the
device, so that a call can be captured in a CUDA graph; for ``torch.compile`` it is one operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

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
        "its queries are the last of the text that the keys are of": problem.is_longer_than_keys,
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
        return decode_launch.on_its_device(inputs)
    others = _others(inputs)
    rotation = inputs.key_rotation
    distance = 0 if rotation is None else rotation.distance
    value = None if inputs.shares_value else inputs.value
    counts = [int(inputs.mask.causal), inputs.mask.window_tokens, distance]
    return _operator(inputs.query, inputs.key, value, others, counts, [inputs.scale, inputs.soft_cap])


# What is refused. Every call is checked, and so the words are put together for one that fails.


def check(inputs: Inputs) -> None:
    """Raise TwofoldError, one sentence, for tensors that do not fit together or that the kernel does not know."""
    query, key, value, pages = inputs.query, inputs.key, inputs.value, inputs.pages
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise _misfit(f"{name} has the shape {tuple(tensor.shape)}: it has four dimensions")
    if reason := supports(inputs.problem):
        raise TwofoldError(f"The {NAME} backend cannot serve this: {reason}; use backend='auto'.")
    batch, heads, num_queries, query_dim = query.shape
    rows, kv_heads, row_keys, head_dim = key.shape
    extension_dim = 0 if inputs.key_extension is None else inputs.key_extension.shape[-1]
    if heads % kv_heads:
        raise _misfit(f"{heads} query heads do not share {kv_heads} KV heads: each has as many")
    if query_dim != head_dim + extension_dim:
        raise _misfit(
            f"{_shape('query', query)}, and {(batch, heads, num_queries, head_dim + extension_dim)} is wanted"
        )
    if pages is None and rows != batch:
        raise _misfit(f"{_shape('key', key)}, and {(batch, kv_heads, row_keys, head_dim)} is wanted")
    if value is not key:
        _fits("value", value, (rows, kv_heads, row_keys, value.shape[3]), (key.dtype,))
        if value.shape[3] > MAX_HEAD_DIM:
            raise _misfit(f"values have {value.shape[3]} dimensions: it is for up to {MAX_HEAD_DIM}")
    _check_others(inputs, (batch, heads, num_queries, inputs.num_keys))
    if inputs.key_rotation is not None:
        _check_rotation(inputs.key_rotation, (batch, inputs.num_keys, head_dim))
    device = query.device
    for other in (key, value, *_others(inputs)):
        if other is not None and other.device != device:
            raise _misfit(f"one tensor is on {device} and another on {other.device}")


def _check_others(inputs: Inputs, sizes: tuple[int, int, int, int]) -> None:
    """All but queries, keys and values, and angles."""
    batch, heads, num_queries, num_keys = sizes
    rows, kv_heads, row_keys, head_dim = inputs.key.shape
    mask, extension = inputs.mask, inputs.key_extension
    whole = (torch.int32, torch.int64)
    if extension is not None:
        _fits("key_extension", extension, (batch, 1, num_keys, extension.shape[-1]), (inputs.query.dtype,))
    _fits("key_scale", inputs.key_scale, (head_dim,))
    _fits("sinks", inputs.sinks, (heads,))
    if inputs.pages is not None:
        _fits("pages", inputs.pages, (batch, inputs.pages.shape[-1]), whole)
    _fits("lengths", mask.lengths, (batch,), whole)
    _fits("key_mask", mask.key_mask, (batch, num_keys), (torch.bool,))
    if mask.positions is not None:
        _fits("positions of queries", mask.positions[0], (num_queries,), whole)
        _fits("positions of keys", mask.positions[1], (num_keys,), whole)
    _spreads("bias", inputs.bias, sizes)
    for name, scales, dim in (
        ("key_scales", inputs.key_scales, head_dim),
        ("value_scales", inputs.value_scales, inputs.value.shape[3]),
    ):
        if scales is not None and scales.ndim == 4 and scales.shape[3] == 1:
            _spreads(name, scales, (rows, kv_heads, row_keys, 1), full=2)
        else:
            _spreads(name, scales, (batch if inputs.pages is None else 1, kv_heads, 1, dim), full=3)


def _check_rotation(rotation: Rotation, sizes: tuple[int, int, int]) -> None:
    batch, num_keys, head_dim = sizes
    pairs = rotation.cosine.shape[-1]
    if not pairs <= rotation.distance <= head_dim - pairs:
        raise _misfit(f"{pairs} pairs of dimensions {rotation.distance} apart do not lie in a head of {head_dim}")
    steady = () if rotation.steady is None else zip(("steady cosine", "steady sine"), rotation.steady, strict=True)
    for name, table in (("cosine", rotation.cosine), ("sine", rotation.sine), *steady):
        wanted = (num_keys, pairs), (batch, 1, num_keys, pairs), (1, 1, num_keys, pairs)
        if tuple(table.shape) not in wanted:
            raise _misfit(f"{_shape(name, table)}, and {wanted[0]} or {wanted[1]} is wanted")


def _fits(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = ()) -> None:
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise _misfit(f"{_shape(name, tensor)}, and {shape} is wanted")
    if dtypes and tensor.dtype not in dtypes:
        raise _misfit(f"{name} has the dtype {tensor.dtype}, and {' or '.join(map(str, dtypes))} is wanted")


def _spreads(name: str, tensor: Tensor | None, shape: tuple[int, ...], full: int = 4) -> None:
    """Dimensions of one element may stand for all, but not from dimension ``full`` on."""
    if tensor is None or tuple(tensor.shape) == shape:
        return
    sizes = zip(tensor.shape, shape, strict=False)
    fits = [size == wanted or (size == 1 and dim < full) for dim, (size, wanted) in enumerate(sizes)]
    if tensor.ndim != len(shape) or not all(fits):
        raise _misfit(f"{_shape(name, tensor)}, which does not spread to {shape}")


def _shape(name: str, tensor: Tensor) -> str:
    return f"{name} has the shape {tuple(tensor.shape)}"


def _misfit(reason: str) -> TwofoldError:
    return TwofoldError(f"The {NAME} backend was given tensors that do not fit together: {reason}.")


# One operator for torch.compile

OTHERS = (
    *("key_scale", "key_extension", "bias", "sinks", "key_scales", "value_scales", "pages", "key_mask", "lengths"),
    *("query_positions", "key_positions", "cosine", "sine", "steady_cosine", "steady_sine"),
)
"""The tensors that there need not be, in the order in which the operator takes them."""


def _others(inputs: Inputs) -> list[Tensor | None]:
    """Those of a call, as :data:`OTHERS` names them."""
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
    """A call from what :func:`attend` made of it, its scale and cap left out."""
    named: dict[str, Any] = dict(zip(OTHERS, others, strict=True))
    causal, window, distance = counts
    rotation = None
    cosine, sine = named.pop("cosine"), named.pop("sine")
    steady = _both(named.pop("steady_cosine"), named.pop("steady_sine"))
    if cosine is not None and sine is not None:
        rotation = Rotation(cosine=cosine, sine=sine, distance=distance, steady=steady)
    mask = Mask(
        causal=bool(causal),
        window_tokens=window,
        key_mask=named.pop("key_mask"),
        positions=_both(named.pop("query_positions"), named.pop("key_positions")),
        lengths=named.pop("lengths"),
    )
    value = key if value is None else value
    return Inputs(query=query, key=key, value=value, mask=mask, scale=1.0, key_rotation=rotation, **named)


def _both(a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if a is None or b is None else (a, b)


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
    return decode_launch.on_its_device(replace(inputs, scale=scales[0], soft_cap=scales[1]))


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
