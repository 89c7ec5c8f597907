"""PyTorch's own fused call: ``torch.nn.functional.scaled_dot_product_attention``, given one tensor twice where V is proportional to K."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from twofold.kernels.inputs import Inputs, Problem

NAME = "sdpa"


def supports(problem: Problem) -> str:
    """Why a problem cannot be served; empty: it can."""
    return f"it does not know: {problem.beyond_pytorch}" if problem.beyond_pytorch else ""


def attend(inputs: Inputs) -> Tensor:
    """[B, H, T, D]."""
    inputs = inputs.plain
    head_dim = inputs.value.shape[-1]
    key, value = _key_and_value(inputs)
    query, _ = _of_one_length(inputs.query, key)
    num_queries, num_keys = query.shape[2], key.shape[2]
    if inputs.bias is None and inputs.mask.is_plain(num_queries, num_keys):
        if num_queries == 1 or not inputs.mask.causal:
            return _call(query, key, value, inputs.scale)[..., :head_dim]
        if num_queries == num_keys:
            return _call(query, key, value, inputs.scale, is_causal=True)[..., :head_dim]
    allowed = inputs.mask.allowed(num_queries, num_keys, query.device)
    if inputs.mask.key_mask is None:  # every query sees itself
        return _call(query, key, value, inputs.scale, mask=_added(allowed, inputs))[..., :head_dim]
    # A row without keys is no softmax: let it see all of them, and drop what it saw.
    sees = allowed.any(dim=-1, keepdim=True)
    return _call(query, key, value, inputs.scale, mask=_added(allowed | ~sees, inputs))[..., :head_dim] * sees


def _key_and_value(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Keys and values of one length: the fused kernels take no other, and without them the call is slower and holds all T × S weights."""
    key, value = inputs.whole_key, inputs.value
    if inputs.key_extension is None:
        return key, value
    extension = inputs.key_extension.expand(-1, key.shape[1], -1, -1)
    extended = torch.cat((key, extension), dim=-1)
    if key is value:
        # One tensor still: the extension is read as a value too, and what it gives is cut off.
        return extended, extended
    return _of_one_length(extended, value)


def _of_one_length(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both [..., D] with zeros up to the longer D: they change no product and no sum that is read."""
    dim = max(a.shape[-1], b.shape[-1])
    first, second = (x if x.shape[-1] == dim else F.pad(x, (0, dim - x.shape[-1])) for x in (a, b))
    return first, second


def _added(allowed: Tensor, inputs: Inputs) -> Tensor:
    if inputs.bias is None:
        return allowed
    return inputs.bias.masked_fill(~allowed, -torch.inf)


def _call(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    batch, heads, num_queries, _ = query.shape
    kv_heads = key.shape[1]
    if heads == kv_heads:
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scale)
    if num_queries == 1:
        # One query per head: the queries of a group are the queries of one KV head. On a CPU this is ten times faster than enable_gqa.
        folded = query.reshape(batch, kv_heads, heads // kv_heads, -1)
        if mask is not None and mask.shape[1] == heads:
            mask = mask.reshape(mask.shape[0], kv_heads, heads // kv_heads, -1)
        output = F.scaled_dot_product_attention(folded, key, value, mask, scale=scale)
        return output.reshape(batch, heads, 1, -1)
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=True)
