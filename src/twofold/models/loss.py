"""The loss that every model computes when it is given labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from twofold.errors import TwofoldError
from twofold.models.sequence import IGNORED


def mean_cross_entropy(logits: Tensor, labels: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of logits [..., N] against labels [...], over labels that are not -100: their mean, or their sum / ``count``.

    Half precision is widened first. Where nothing is scored the loss is 0, with zero gradients. Raises TwofoldError for shapes that do not fit and for labels that are no classes.
    """
    if logits.shape[:-1] != labels.shape:
        raise TwofoldError(
            f"labels have the shape {tuple(labels.shape)}, but must be {tuple(logits.shape[:-1])}: one per prediction."
        )
    if labels.is_floating_point():
        raise TwofoldError(
            f"labels are {labels.dtype}, but classes are whole numbers: regression is not what this model computes."
        )
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    flat = labels.flatten()
    total = F.cross_entropy(logits.flatten(0, -2), flat, ignore_index=IGNORED, reduction="sum")
    if count is None:
        count = (flat != IGNORED).sum().clamp(min=1)
    return total / count
