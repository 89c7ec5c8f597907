"""Lists of digits to be reversed, sorted, subtracted, swapped or copied: one mechanism, and a function for each.

Every token of a list of T digits 0-9 gets one of ten labels; the model is a non-causal encoder with learned positions, and the score is
the share of tokens that are right. Tokens through an embedding table are the paper's one-hot vectors through a matrix. Task names with the same
options read the same lists.
Source: paper, section on synthetic tasks (T 16, 64, 128; 10,000 lists; 2 epochs in print, 10 in the corrected setting).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from twofold.tasks.options import Options
from twofold.tasks.task import TableTask, TaskKind, apart, generator

DIGITS = 10


@dataclass(frozen=True, kw_only=True)
class ListOptions(Options):
    """``length`` is T."""

    length: int = 64
    train_size: int = 10_000
    held_out_size: int = 2_000
    data_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "length", "train_size", "held_out_size")
        self.require_seed()


@dataclass(frozen=True, kw_only=True)
class EvenListOptions(ListOptions):
    """Lists that have two halves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("length", self.length % 2 == 0, "even, for a list to have two halves")


def swapped_halves(lists: np.ndarray) -> np.ndarray:
    """[a, b] -> [b, a] for halves a and b of each row of [N, T]."""
    return np.roll(lists, lists.shape[1] // 2, axis=1)


LABELS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "reverse": lambda lists: lists[:, ::-1],
    "sort": lambda lists: np.sort(lists, axis=1),
    "sub": lambda lists: DIGITS - 1 - lists,
    "swap": swapped_halves,
    "copy": np.copy,
}
"""Lists [N, T] -> labels [N, T]."""

SUMMARIES = {
    "reverse": "a list of digits, backwards",
    "sort": "a list of digits, in ascending order",
    "sub": "nine minus each digit of a list",
    "swap": "a list of digits, its halves exchanged",
    "copy": "a list of digits, as it is",
}


class ListTask(TableTask):
    """One of :data:`LABELS` over uniformly drawn lists."""

    def __init__(self, name: str, options: ListOptions) -> None:
        def part(part_name: str, size: int) -> dict[str, torch.Tensor]:
            lists = generator(options.data_seed, part_name).randint(
                0, DIGITS, size=(size, options.length), dtype=np.uint8
            )
            labels = LABELS[name](lists).copy()
            return {"input_ids": torch.from_numpy(lists), "labels": torch.from_numpy(labels)}

        train, held_out = apart(part, options.train_size, options.held_out_size)
        super().__init__(
            name=name,
            train=train,
            held_out=held_out,
            description=f"{name.upper()}: {SUMMARIES[name]}; {options.length} digits, {options.train_size:,} lists for training, "
            f"{options.held_out_size:,} held out.",
            tokens_per_example=options.length,
            model_fields={
                "architecture": "token_classification",
                "vocab_size": DIGITS,
                "num_labels": DIGITS,
                "causal": False,
                "positions": {"kind": "learned", "length": options.length},
            },
        )


KINDS = tuple(
    TaskKind(
        name=name,
        summary=f"{SUMMARIES[name]}: a label for each, by an encoder",
        options=EvenListOptions if name == "swap" else ListOptions,
        load=partial(ListTask, name),
    )
    for name in LABELS
)
