"""Decoding on a processor: compiled code that reads one tensor once, as keys and as values, tile by tile, for a few queries over many keys.

Two tensors are read by the same code. Keys may be floats or codes of eight bits, lie in a row or in pages, and turn as they are read. It is C++ (``native/``)
for AVX2, AVX-512, AVX-512-BF16 and AMX, chosen when it runs, and for any other processor as its compiler understands it. Where Twofold was installed
without a compiler there is none, and other backends serve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.kernels.inputs import Inputs, Problem

try:
    import twofold.kernels._native as _native
except ImportError:
    _native = None

NAME = "native"

MAX_QUERIES = 16
"""For more, products of matrices that are computed once for all queries are faster."""

FLOATS = ("float32", "bfloat16", "float16")


def levels() -> tuple[str, ...]:
    """The instruction sets that it can use here, from the slowest to the fastest; none where it was not compiled."""
    return () if _native is None else tuple(_native.levels())


def read(tensor: Tensor) -> int:
    """The sum of a tensor's whole 64-bit words, wrapping around, as fast as its memory can be read: what decoding is measured against."""
    return int(_native.read(tensor, threads=torch.get_num_threads()))


def supports(problem: Problem) -> str:
    """Why a problem cannot be served; empty: it can."""
    if _native is None:
        return "it was not compiled when Twofold was installed: install it again where there is a C++20 compiler (GCC or Clang)"
    if problem.device != "cpu":
        return f"it runs on a CPU, not on {problem.device}"
    if problem.dtype not in FLOATS or problem.key_dtype not in (problem.dtype, "int8"):
        return (
            f"queries of {problem.dtype} and keys of {problem.key_dtype}: it has {', '.join(FLOATS)}, and keys of int8"
        )
    reasons = {
        "it has no gradient": problem.needs_gradient,
        "it adds no bias to logits": problem.has_bias,
        "it reads one document at a time": problem.has_segments,
        f"it is for up to {MAX_QUERIES} queries over keys of before": problem.num_queries > MAX_QUERIES
        or problem.num_queries == problem.num_keys > 1,
        "its queries are the last of the text that the keys are of": problem.is_longer_than_keys,
        "other programs, which a model is exported for, do not know it": torch.compiler.is_exporting(),
        "keys in pages are not extended": problem.has_pages and problem.key_extension_dim > 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def attend(inputs: Inputs, *, level: str = "") -> Tensor:
    """[B, H, T, D]; by the fastest of :func:`levels` up to ``level``, if it is given."""
    rotation, mask = inputs.key_rotation, inputs.mask
    table = (None, None) if rotation is None else rotation.steady or (rotation.cosine, rotation.sine)
    queries, keys = mask.positions or (None, None)
    shares = inputs.shares_value
    others = {
        # An operator may not be given one tensor twice.
        "value": None if shares else inputs.value,
        "value_scales": None if shares else inputs.value_scales,
        "key_scales": inputs.key_scales,
        "extension": inputs.key_extension,
        "key_scale": inputs.key_scale,
        "cosine": table[0],
        "sine": table[1],
        "sinks": inputs.sinks,
        "lengths": mask.lengths,
        "query_positions": queries,
        "key_positions": keys,
        "key_mask": mask.key_mask,
        "pages": inputs.pages,
    }
    is_steady = rotation is not None and rotation.steady is not None
    integers = [mask.causal, mask.window_tokens, 0 if rotation is None else rotation.distance, is_steady]
    run = _operator if torch.compiler.is_compiling() else _run
    handed, numbers = [others[name] for name in HANDED_OVER], [inputs.scale, inputs.soft_cap]
    return run(inputs.query, inputs.key, handed, numbers, [int(x) for x in integers], level)


def _run(
    query: Tensor,
    key: Tensor,
    others: Sequence[Tensor | None],
    numbers: Sequence[float],
    integers: Sequence[int],
    level: str,
) -> Tensor:
    """``others`` in the order of :data:`HANDED_OVER`; scale and soft cap; causal, window, distance of a pair, and whether the table is steady."""
    handed = zip(HANDED_OVER.items(), others, strict=True)
    given = {name: None if tensor is None else ready(tensor.detach()) for (name, ready), tensor in handed}
    value = given.pop("value")
    batch, heads, num_queries, _ = query.shape
    head_dim = (key if value is None else value).shape[3]
    output = torch.empty(batch, heads, num_queries, head_dim, dtype=torch.float32)
    scale, soft_cap = numbers
    is_causal, window, distance, is_steady = integers
    try:
        _native.attend(
            _floats(query.detach()),
            output,
            _rows(key.detach()),
            value,
            scale=scale,
            soft_cap=soft_cap,
            is_causal=bool(is_causal),
            window=window,
            distance=distance,
            is_steady=bool(is_steady),
            query_is_bfloat16=query.dtype == torch.bfloat16,
            threads=torch.get_num_threads(),
            level=level,
            **given,
        )
    except ValueError as error:
        raise TwofoldError(str(error)) from None
    return output.to(query.dtype)


@torch.library.custom_op("twofold::native_attention", mutates_args=())
def _operator(
    query: Tensor,
    key: Tensor,
    others: Sequence[Tensor | None],
    numbers: Sequence[float],
    integers: Sequence[int],
    level: str,
) -> Tensor:
    return _run(query, key, others, numbers, integers, level)


@_operator.register_fake
def _(
    query: Tensor,
    key: Tensor,
    others: Sequence[Tensor | None],
    numbers: Sequence[float],
    integers: Sequence[int],
    level: str,
) -> Tensor:
    del numbers, integers, level
    value = key if others[0] is None else others[0]
    return query.new_empty(*query.shape[:3], value.shape[3])


def _rows(held: Tensor) -> Tensor:
    """The numbers of a row side by side, which they are in every cache."""
    return held if held.stride(3) == 1 or held.shape[3] < 2 else held.contiguous()


def _floats(given: Tensor) -> Tensor:
    return given.to(torch.float32).contiguous()


def _scales(given: Tensor) -> Tensor:
    """Where they lie: those of tokens are a part of a cache's room."""
    return _rows(given.to(torch.float32))


def _numbers(given: Tensor) -> Tensor:
    return given.to(torch.int64).contiguous()


def _table(given: Tensor) -> Tensor:
    """[S, n] or [B, S, n], of [.., 1, S, n] as a rotation has it."""
    if given.ndim == 4:
        given = given[0, 0] if given.shape[0] == 1 else given[:, 0]
    return given if given.stride(-1) == 1 or given.shape[-1] < 2 else given.contiguous()


def _as_it_is(given: Tensor) -> Tensor:
    return given


HANDED_OVER: Mapping[str, Callable[[Tensor], Tensor]] = {
    "value": _rows,
    "value_scales": _scales,
    "key_scales": _scales,
    "extension": _rows,
    "key_scale": _floats,
    "cosine": _table,
    "sine": _table,
    "sinks": _floats,
    "lengths": _numbers,
    "query_positions": _numbers,
    "key_positions": _numbers,
    "key_mask": _as_it_is,
    "pages": _numbers,
}
"""What the compiled function may be given beside query and key, and what is done to it before."""
