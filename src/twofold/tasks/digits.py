"""The 1,797 handwritten digits that scikit-learn holds, 8 × 8 pixels of 17 greys: images without a download."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from twofold.tasks.extras import data_library
from twofold.tasks.options import Options
from twofold.tasks.pixels import Pictures, PixelTask
from twofold.tasks.task import TaskKind, generator

NUM_IMAGES = 1797
SIZE = 8
GREYS = 16


@dataclass(frozen=True, kw_only=True)
class DigitsOptions(Options):
    """``data_seed`` draws which images are held out."""

    patch_size: int = 2
    held_out_size: int = 360
    data_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("patch_size", self.patch_size in (1, 2, 4, 8), "1, 2, 4 or 8, to tile 8 pixels")
        self.require("held_out_size", 1 <= self.held_out_size < NUM_IMAGES, f"from 1 to {NUM_IMAGES - 1}")
        self.require_seed()


def handwritten_digits() -> Pictures:
    """All of them, in scikit-learn's order; greys 0 to 16."""
    loaded = data_library("sklearn.datasets", "read the handwritten digits").load_digits()
    return Pictures(
        pixels=loaded.images.astype(np.uint8).reshape(NUM_IMAGES, 1, SIZE, SIZE), labels=loaded.target.astype(np.int64)
    )


def _load(options: DigitsOptions) -> PixelTask:
    every = handwritten_digits()
    order = generator(options.data_seed, "digits").permutation(NUM_IMAGES)
    held_out, train = order[: options.held_out_size], order[options.held_out_size :]
    return PixelTask(
        name="digits",
        train=Pictures(pixels=every.pixels[train], labels=every.labels[train]),
        held_out=Pictures(pixels=every.pixels[held_out], labels=every.labels[held_out]),
        num_labels=10,
        patch_size=options.patch_size,
        description=f"scikit-learn's handwritten digits, 8 × 8 pixels: {len(train):,} for training, {len(held_out):,} held out.",
    )


KINDS = (
    TaskKind(
        name="digits",
        summary="which of ten digits an image of 8 × 8 pixels shows (scikit-learn's; no download)",
        options=DigitsOptions,
        load=_load,
    ),
)
