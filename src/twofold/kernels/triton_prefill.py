"""Prefill and training in Triton: forward and backward over one stream that is key and value at once, with the memory of one.

Where V = K, the stream is read once for both products, kept once for the way back, and has one gradient, in which what reaches it as key and
as value is added up in float32 before it is rounded. Keys that turn when they are read turn inside of the kernel. With two tensors the same code
computes the same attention, for comparison; ``auto`` leaves that to PyTorch.

Windows, packed documents, padding and chunks of queries are masks that kernels know; tiles that all queries are too far from, or that are of other
documents, are not visited.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from twofold.errors import TwofoldError
from twofold.kernels.inputs import Inputs, Problem, Rotation
from twofold.kernels.triton import compute_capability, why_not
from twofold.kernels.triton_prefill_launch import (
    Settings,
    Streams,
    empty_gradients,
    empty_heads,
    run_backward,
    run_forward,
)

NAME = "triton_prefill"
DTYPES = ("bfloat16", "float16", "float32")
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
TUNED_CAPABILITY = 9
# Fewer queries than half a tile leave tensor cores idle.
MIN_QUERIES_THAT_PAY = 32


def supports(problem: Problem) -> str:
    """Why a problem cannot be served; empty: it can."""
    if reason := why_not(problem.device):
        return reason
    has = {
        "a bias": problem.has_bias,
        "a key that all heads share": problem.key_extension_dim,
        "pages": problem.has_pages,
        "scales of keys": problem.has_scales,
        "lengths": problem.has_lengths,
        "positions": problem.has_positions,
        "a soft cap": problem.soft_cap,
        "sinks": problem.has_sinks,
    }
    if given := ", ".join(name for name, it_has in has.items() if it_has):
        return f"it does not know: {given}"
    if problem.is_longer_than_keys:
        return "its queries are the last of the text that the keys are of"
    if torch.compiler.is_exporting():
        return "other programs, which a model is exported for, do not know it"
    if problem.dtype not in DTYPES or problem.key_dtype != problem.dtype:
        return f"it serves one dtype of {', '.join(DTYPES)}"
    if not MIN_HEAD_DIM <= problem.head_dim <= MAX_HEAD_DIM:
        return f"it serves head_dim {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
    return ""


def pays(problem: Problem) -> str:
    """Why ``auto`` should leave a problem to others, though it can be served; empty: it should not."""
    if not problem.shares_value:
        return "keys and values are two tensors"
    if problem.dtype == "float32":
        return "tensor cores do not multiply float32 exactly"
    if not _is_tuned_for(problem.device):
        return "its tiles are tuned for GPUs of compute capability 9 (H100, H200)"
    return f"there are fewer than {MIN_QUERIES_THAT_PAY} queries" if problem.num_queries < MIN_QUERIES_THAT_PAY else ""


def _is_tuned_for(device: str) -> bool:
    """Whether a GPU is one for which tiles were looked for with care; elsewhere PyTorch's kernels may be faster."""
    return device != "cuda" or compute_capability()[0] == TUNED_CAPABILITY


# A compiler takes the answer as it is: what torch.compiler.assume_constant_result does, which imports the whole of it.
_is_tuned_for._dynamo_marked_constant = True  # type: ignore[attr-defined]


def attend(inputs: Inputs) -> Tensor:
    """[B, H, T, D]. Raises TwofoldError for what it does not serve, and for shapes and dtypes that do not belong together."""
    query, key, value, key_scale = inputs.query, inputs.key, inputs.value, inputs.key_scale
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        shared = key is value
        query, key = query.to(dtype), key.to(dtype)
        value = key if shared else value.to(dtype)
    scale = inputs.scale
    if scale <= 0:  # the highest logit of a query must be that of the highest product
        query, scale = (-query, -scale) if scale else (query * 0, 1.0)
    rotation, mask = inputs.key_rotation, inputs.mask
    cosine, sine = (None, None) if rotation is None else (_table(rotation.cosine), _table(rotation.sine))
    streams = Streams(
        query, key, None if key is value else value, key_scale, cosine, sine, mask.key_mask, mask.segments
    )
    _check(streams, rotation)
    if reason := supports(replace(inputs, query=query, key=key, value=value).problem):
        raise TwofoldError(f"The {NAME} backend cannot serve this: {reason}; use backend='auto'.")
    settings = Settings(
        scale=scale,
        causal=mask.causal,
        window_tokens=mask.window_tokens,
        distance=0 if rotation is None else rotation.distance,
    )
    if torch.compiler.is_compiling():
        return _forward_op(*streams, **_named(settings))[0]
    output: Tensor = _Attention.apply(settings, *streams)[0]
    return output


def _table(x: Tensor) -> Tensor:
    """[S, n] or [B, 1, S, n] as [1 or B, S, n], with the numbers of a row next to each other."""
    table = x[None] if x.ndim == 2 else x.squeeze(1)
    return table if table.stride(-1) == 1 else table.contiguous()


# What is differentiated. The two passes are operations of their own, so that a compiler sees them as they are.


_STREAMS = (
    "Tensor query, Tensor key, Tensor? value, Tensor? key_scale, "
    "Tensor? cosine, Tensor? sine, Tensor? key_mask, Tensor? segments"
)
_SETTINGS = "float scale, bool causal, int window_tokens, int distance"


@torch.library.custom_op(
    "twofold::prefill",
    mutates_args=(),
    schema=f"({_STREAMS}, *, {_SETTINGS}) -> (Tensor, Tensor)",
)
def _forward_op(*streams: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    return run_forward(Streams(*streams), Settings(**settings))


@_forward_op.register_fake
def _(*streams: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    del settings
    output = empty_heads(Streams(*streams).query)
    return output, output.new_empty(output.shape[:3], dtype=torch.float32)


@torch.library.custom_op(
    "twofold::prefill_backward",
    mutates_args=(),
    schema=f"(Tensor gradient, Tensor output, Tensor logarithm, {_STREAMS}, *, bool wants_query, bool wants_stream, {_SETTINGS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(
    *tensors: Any, wants_query: bool, wants_stream: bool, **settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wants = (wants_query, wants_stream)
    return run_backward(Streams(*tensors[3:]), Settings(**settings), tensors[:3], wants=wants)


@_backward_op.register_fake
def _(*tensors: Any, wants_query: bool, wants_stream: bool, **settings: Any) -> tuple[Tensor, ...]:
    del settings
    return empty_gradients(Streams(*tensors[3:]), (wants_query, wants_stream))


def _keep(ctx: Any, inputs: tuple[Tensor | None, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    """For the way back: query, stream, output and logarithms, besides what all layers share."""
    ctx.settings = Settings(**keyword_only_inputs)
    ctx.save_for_backward(*output, *inputs)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, make: Callable[..., tuple[Tensor, ...]], gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of each stream the gradient that ``make`` gives, or none."""
    needs = ctx.needs_input_grad[-len(Streams._fields) :]
    if gradient is None:
        return (None,) * len(needs)
    wants = (needs[0], needs[1] or needs[2] or needs[3])
    made = make(ctx.settings, wants, gradient, *ctx.saved_tensors)
    return *(one if need else None for one, need in zip(made, needs, strict=False)), None, None, None, None


def _by_operation(settings: Settings, wants: tuple[bool, bool], *tensors: Any) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = _backward_op(
        *tensors, wants_query=wants[0], wants_stream=wants[1], **_named(settings)
    )
    return gradients


_forward_op.register_autograd(lambda ctx, gradient, _: _gradients(ctx, _by_operation, gradient), setup_context=_keep)


class _Attention(Function):
    """The same without a compiler, for which an operation would cost time in each call, and which functorch cannot map."""

    @staticmethod
    def forward(settings: Settings, *streams: Any) -> tuple[Tensor, Tensor]:
        return run_forward(Streams(*streams), settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _keep(ctx, inputs[1:], _named(inputs[0]), output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_gradients(ctx, _Gradients.apply, gradients[0])

    @staticmethod
    def vmap(info: Any, in_dims: Any, *given: Any) -> tuple[tuple[Tensor, Tensor], int]:
        """Models side by side are sequences of one batch."""
        streams = _folded(Streams(*given[1:]), in_dims[1:], info.batch_size)
        output, logarithm = _Attention.apply(given[0], *streams)
        rows = (info.batch_size, -1)
        return (output.unflatten(0, rows), logarithm.unflatten(0, rows)), 0


class _Gradients(Function):
    """The results of :func:`run_backward`."""

    @staticmethod
    def forward(settings: Settings, wants: tuple[bool, bool], *tensors: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return run_backward(Streams(*tensors[3:]), settings, tensors[:3], wants=wants)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        del ctx, gradients
        raise TwofoldError(
            f"Attention by {NAME} has a gradient, and that has none: use backend='reference' for second derivatives."
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *given: Any) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        count = info.batch_size
        rows = [_rows(x, dim, count).flatten(0, 1) for x, dim in zip(given[2:5], in_dims[2:5], strict=True)]
        streams = _folded(Streams(*given[5:]), in_dims[5:], count)
        made = _Gradients.apply(*given[:2], *rows, *streams)
        mapped = tuple(x.unflatten(0, (count, -1)) if x.numel() else x for x in made)
        return mapped, tuple(0 if x.numel() else None for x in made)


def _named(settings: Settings) -> dict[str, Any]:
    return {
        "scale": settings.scale,
        "causal": settings.causal,
        "window_tokens": settings.window_tokens,
        "distance": settings.distance,
    }


def _rows(x: Tensor, dim: int | None, count: int) -> Tensor:
    """[count, ...]: what is mapped along its own dimension, or the same for all."""
    return x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)


def _folded(streams: Streams, dims: tuple[int | None, ...], count: int) -> Streams:
    """Those of ``count`` models as those of one, whose batch is so many times longer."""
    if streams.key_scale is not None:
        raise TwofoldError(
            f"{NAME} does not map keys that are scaled: use backend='sdpa' for many models as one program."
        )
    made: dict[str, Tensor | None] = {}
    for (name, x), dim in zip(streams._asdict().items(), dims, strict=True):
        if x is None or (name in ("cosine", "sine") and dim is None and x.shape[0] == 1):
            made[name] = x
            continue
        rows = _rows(x, dim, count)
        if name in ("cosine", "sine"):
            batch = made["query"].shape[0] // count  # type: ignore[union-attr]
            rows = rows.expand(-1, batch, -1, -1)
        made[name] = rows.flatten(0, 1)
    return Streams(**made)  # type: ignore[arg-type]


# What belongs together


def _check(streams: Streams, rotation: Rotation | None) -> None:
    """Raise TwofoldError where tensors do not fit each other: a kernel would read what is not there."""
    query, key, value = streams.query, streams.key, streams.value
    if query.ndim != 4 or key.ndim != 4:
        raise TwofoldError(f"Attention wants queries and keys of 4 dimensions, and got {query.ndim} and {key.ndim}.")
    batch, heads, _, head_dim = query.shape
    kv_heads, num_keys = key.shape[1:3]
    if (key.shape[0], key.shape[3]) != (batch, head_dim) or not kv_heads or heads % kv_heads:
        raise TwofoldError(
            f"Keys {tuple(key.shape)} do not fit queries {tuple(query.shape)}: batch and head_dim must be equal, and KV heads divide the heads."
        )
    if value is not None and value.shape != key.shape:
        raise TwofoldError(
            f"Values {tuple(value.shape)} do not fit keys {tuple(key.shape)}: {NAME} wants the same shape."
        )
    floats = [x for x in streams[:3] if x is not None]
    if len({x.dtype for x in floats}) > 1 or str(query.dtype).removeprefix("torch.") not in DTYPES:
        given = ", ".join(str(x.dtype).removeprefix("torch.") for x in floats)
        raise TwofoldError(f"Queries, keys and values are {given}: {NAME} wants one dtype of {', '.join(DTYPES)}.")
    rows = {"key_mask": streams.key_mask, "segments": streams.segments}
    for name, x in rows.items():
        if x is not None and x.shape != (batch, num_keys):
            raise TwofoldError(
                f"{name} has the shape {tuple(x.shape)}, but must be (batch, keys) = {(batch, num_keys)}."
            )
    if streams.key_mask is not None and streams.key_mask.dtype != torch.bool:
        raise TwofoldError(f"key_mask is {streams.key_mask.dtype}, but must be bool: False hides a key.")
    if streams.segments is not None and streams.segments.dtype not in (torch.int32, torch.int64):
        raise TwofoldError(f"segments are {streams.segments.dtype}, but must be int32 or int64: numbers of documents.")
    if streams.key_scale is not None and streams.key_scale.shape != (head_dim,):
        raise TwofoldError(f"key_scale has the shape {tuple(streams.key_scale.shape)}, but must be ({head_dim},).")
    _check_rotation(streams, rotation)
    if len({x.device for x in streams if x is not None}) > 1:
        devices = ", ".join(sorted({str(x.device) for x in streams if x is not None}))
        raise TwofoldError(f"Attention was given tensors on {devices}: put all of them on one device.")


def _check_rotation(streams: Streams, rotation: Rotation | None) -> None:
    cosine, sine = streams.cosine, streams.sine
    if rotation is None or cosine is None or sine is None:
        return
    if torch.is_grad_enabled() and (cosine.requires_grad or sine.requires_grad):
        raise TwofoldError(
            "Cosines and sines have no gradient here: use backend='reference' for tables that are learned."
        )
    (batch, _, _, head_dim), num_keys, pairs = streams.query.shape, streams.key.shape[2], cosine.shape[-1]
    if cosine.shape != sine.shape or cosine.shape[:2] not in ((1, num_keys), (batch, num_keys)):
        raise TwofoldError(
            f"Cosines and sines have {tuple(cosine.shape[:2])} and {tuple(sine.shape[:2])} rows, but there are {num_keys} keys."
        )
    if not 0 < pairs <= rotation.distance or rotation.distance + pairs > head_dim:
        raise TwofoldError(
            f"{pairs} pairs at a distance of {rotation.distance} do not fit into a head of {head_dim}: use n <= distance <= head_dim - n."
        )
