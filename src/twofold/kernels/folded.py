"""Attention as plain matrix products, for graphs that other runtimes carry out: no key is repeated, and no size is looked at.

The query heads that read one KV head are rows of one matrix, so grouped queries need no copies of keys; and the same operations are done whatever
the numbers of queries and keys are, so a graph that was traced once serves them all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twofold.kernels.inputs import Inputs, Problem

NAME = "folded"


def supports(problem: Problem) -> str:
    """Why a problem cannot be served; empty: it can."""
    del problem
    return ""


def attend(inputs: Inputs) -> Tensor:
    """[B, H, T, D]."""
    query, key, value = inputs.scale * inputs.query, inputs.key, inputs.value
    if inputs.key_rotation is not None:
        key = inputs.key_rotation.turn(key)
    num_queries, head_dim = query.shape[2], key.shape[3]
    logits = _product(query[..., :head_dim], key.transpose(-1, -2))
    if inputs.key_extension is not None:
        logits = logits + _product(query[..., head_dim:], inputs.key_extension.transpose(-1, -2))
    if inputs.bias is not None:
        logits = logits + inputs.bias
    allowed = inputs.mask.allowed(num_queries, key.shape[2], query.device)
    # A row without keys is no softmax: let it see all of them, and drop what it saw.
    sees = allowed.any(dim=-1, keepdim=True)
    hidden = torch.zeros_like(allowed, dtype=query.dtype).masked_fill(sees & ~allowed, -torch.inf)
    return _product(torch.softmax(logits + hidden, dim=-1), value) * sees


def _product(left: Tensor, right: Tensor) -> Tensor:
    """[B, H, T, N] and [B, G, N, M] -> [B, H, T, M], each of the H by the G-th part that it belongs to."""
    batch, heads, rows, columns = left.shape
    groups = right.shape[1]
    if heads == groups:
        return left @ right
    folded = left.reshape(batch, groups, (heads // groups) * rows, columns)
    return (folded @ right).reshape(batch, heads, rows, right.shape[3])
