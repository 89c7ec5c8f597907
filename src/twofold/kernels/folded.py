"""Attention as plain matrix products, for graphs that other runtimes carry out: no key is repeated, and no size is looked at.

The query heads that read one KV head are rows of one matrix, so grouped queries need no copies of keys; and the same operations are done whatever
the numbers of queries and keys are, so a graph that was traced once serves them all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twofold.kernels.inputs import Inputs, Mask, Problem

NAME = "folded"


def supports(problem: Problem) -> str:
    """Why a problem cannot be served; empty: it can."""
    return f"it does not know: {problem.beyond_pytorch}" if problem.beyond_pytorch else ""


def attend(inputs: Inputs) -> Tensor:
    """[B, H, T, D]."""
    inputs = inputs.plain
    query, key = inputs.scale * inputs.query, inputs.key
    head_dim = key.shape[3]
    logits = _of_keys(query[..., :head_dim], inputs)
    if inputs.key_extension is not None:
        logits = logits + _logits(query[..., head_dim:], inputs.key_extension)
    if inputs.bias is not None:
        logits = logits + inputs.bias
    return _product(weights_of(logits, inputs.mask), inputs.value)


def weights_of(logits: Tensor, mask: Mask) -> Tensor:
    """The softmax of logits [B, H, T, S] over the keys that ``mask`` allows; 0 for a query that may see none."""
    num_queries, num_keys = logits.shape[2:]
    if mask.is_plain(num_queries, num_keys) and (num_queries == 1 or not mask.causal):
        return torch.softmax(logits, dim=-1)
    allowed = mask.allowed(num_queries, num_keys, logits.device)
    # A row without keys is no softmax: let it see all of them, and drop what it saw.
    sees = allowed.any(dim=-1, keepdim=True)
    hidden = torch.zeros_like(allowed, dtype=logits.dtype).masked_fill(sees & ~allowed, -torch.inf)
    return torch.softmax(logits + hidden, dim=-1) * sees


def _of_keys(query: Tensor, inputs: Inputs) -> Tensor:
    """q · R(s ⊙ k), [B, H, T, S]. No copy is made of the dimensions of the key that do not turn: their scale is the query's."""
    key, rotation, scale = inputs.key, inputs.key_rotation, inputs.key_scale
    if rotation is not None and 2 * rotation.cosine.shape[-1] == key.shape[3]:
        return _logits(query, inputs.whole_key)
    scaled = query if scale is None else query * scale
    if rotation is None:
        return _logits(scaled, key)
    still = _logits(rotation.without_turning(scaled), key)
    return still + _logits(rotation.turning(query), rotation.turned(key, scale))


def _logits(query: Tensor, key: Tensor) -> Tensor:
    """q · k of every pair: [B, H, T, D] and [B, G, S, D] -> [B, H, T, S].

    Keys stand on the left of the product, as they lie in memory: for numbers of 16 bits PyTorch would first copy the transpose of them all.
    """
    batch, heads, rows, columns = query.shape
    folded = query.reshape(batch, key.shape[1], (heads // key.shape[1]) * rows, columns)
    return (key @ folded.transpose(-1, -2)).transpose(-1, -2).reshape(batch, heads, rows, key.shape[2])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """[B, H, T, N] and [B, G, N, M] -> [B, H, T, M], each of the H by the G-th part that it belongs to."""
    batch, heads, rows, columns = left.shape
    groups = right.shape[1]
    if heads == groups:
        return left @ right
    folded = left.reshape(batch, groups, (heads // groups) * rows, columns)
    return (folded @ right).reshape(batch, heads, rows, right.shape[3])
