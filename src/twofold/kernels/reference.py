"""The readable backend: attention as it is written on paper, in any dtype and on any device; it holds all T × S weights."""

from __future__ import annotations

import torch
from torch import Tensor

from twofold.kernels.inputs import Inputs, Problem

NAME = "reference"


def supports(problem: Problem) -> str:
    """Why a problem cannot be served; empty: it can."""
    del problem
    return ""


def attend(inputs: Inputs) -> Tensor:
    """[B, H, T, D]."""
    inputs = inputs.plain
    query, key, value = inputs.query, inputs.whole_key, inputs.value
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    if inputs.key_extension is not None:
        key = torch.cat((key, inputs.key_extension.expand(-1, key.shape[1], -1, -1)), dim=-1)
    logits = inputs.scale * query @ key.transpose(-1, -2)
    if inputs.soft_cap:
        logits = inputs.soft_cap * torch.tanh(logits / inputs.soft_cap)
    if inputs.bias is not None:
        logits = logits + inputs.bias
    allowed = inputs.mask.allowed(query.shape[2], key.shape[2], query.device)
    logits = logits.masked_fill(~allowed, -torch.inf)
    nothing = ~allowed.any(dim=-1, keepdim=True)
    logits = logits.masked_fill(nothing, 0.0)
    if inputs.sinks is not None:
        logits = torch.cat((logits, inputs.sinks[:, None, None].expand(*logits.shape[:3], 1).to(logits)), dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., : key.shape[2]].masked_fill(nothing, 0.0)
    if inputs.weights is not None:
        inputs.weights.append(weights)
    return weights @ value
