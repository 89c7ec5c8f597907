"""Images of one size as a task: stored as bytes, normalised by the training part's channels, cut into patches by the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.tasks.task import Batch, Part, TableTask


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """``pixels`` uint8 [N, channels, size, size] and ``labels`` int64 [N]."""

    pixels: np.ndarray
    labels: np.ndarray


class PixelTask(TableTask):
    """One label for each image, by a vision transformer with a class token: (size / patch)² + 1 tokens, learned positions."""

    def __init__(self, *, train: Pictures, held_out: Pictures, num_labels: int, patch_size: int, **facts: Any) -> None:
        _, num_channels, size, _ = train.pixels.shape
        if patch_size < 1 or size % patch_size:
            raise TwofoldError(
                f"Task {facts['name']}: patches of {patch_size} pixels do not tile an image of {size} pixels: change patch_size or image_size."
            )
        num_tokens = (size // patch_size) ** 2 + 1
        super().__init__(
            train=_columns(train),
            held_out=_columns(held_out),
            tokens_per_example=num_tokens,
            model_fields={
                "architecture": "image_classification",
                "image_size": size,
                "patch_size": patch_size,
                "num_channels": num_channels,
                "num_labels": num_labels,
                "causal": False,
                "positions": {"kind": "learned", "length": num_tokens},
            },
            **facts,
        )
        self._mean, self._deviation = _channel_statistics(train.pixels)

    def batch(self, part: Part, rows: Tensor) -> Batch:
        """``pixel_values`` float32, of mean 0 and deviation 1 per channel over the training part, and ``labels``."""
        pixels = (part["pixels"][rows].float() - self._mean) / self._deviation
        return {"pixel_values": pixels, "labels": part["labels"][rows]}


def _columns(pictures: Pictures) -> dict[str, Tensor]:
    return {"pixels": torch.from_numpy(pictures.pixels), "labels": torch.from_numpy(pictures.labels)}


def _channel_statistics(pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, float32 [channels, 1, 1], from exact counts of the 256 values."""
    values = np.arange(256)
    counts = [np.bincount(pixels[:, channel].ravel(), minlength=256) for channel in range(pixels.shape[1])]
    means = np.array([np.average(values, weights=count) for count in counts])
    variances = [np.average((values - mean) ** 2, weights=count) for mean, count in zip(means, counts, strict=True)]
    deviations = np.sqrt(np.maximum(variances, 1.0))  # a channel of one value stays at 0
    return tuple(torch.from_numpy(x).float().view(-1, 1, 1) for x in (means, deviations))  # type: ignore[return-value]
