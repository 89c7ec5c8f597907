"""Word problems of a group: after each element of a sequence, what all so far multiply to.

    Z2 (parity)   0 1 1 0 1        S3   2 4 1 ...
                  0 1 0 0 1             2 2·4 2·4·1 ...

Z2 and other Zn commute; S3 does not, but is solvable; A5 and S5 are not solvable, and no constant number of layers of
attention solves their words of every length unless TC0 = NC1.
Source: "The Illusion of State in State-Space Models" (arXiv:2404.08819), its published generator and settings: A5, 20 elements,
a million different words, of which four fifths are for training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from twofold.tasks.options import Options
from twofold.tasks.task import IGNORED, Batch, TableTask, TaskKind, generator

_NAME = re.compile(r"Z([1-9]\d{0,2})|([SA])([2-5])")
MAX_ORDER = 255


@dataclass(frozen=True, kw_only=True)
class StateTrackingOptions(Options):
    """``group`` is Z2 to Z255 (numbers added modulo n), or S2 to S5, or A2 to A5 (permutations, all or the even ones); ``length`` counts elements.

    No word is drawn twice, and so no held-out word is in training.
    """

    group: str = "A5"
    length: int = 20
    train_size: int = 800_000
    held_out_size: int = 10_000
    data_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "length", "train_size", "held_out_size")
        known = _NAME.fullmatch(self.group) and self.group != "A2" and 2 <= self.order <= MAX_ORDER
        self.require("group", bool(known), f"Z2 to Z{MAX_ORDER}, S2 to S5, or A3 to A5")
        # One in five is left over, or the last ones would be found by chance for a long time.
        words, least = self.order**self.length, (self.train_size + self.held_out_size) * 5 // 4
        self.require(
            "length",
            words >= least,
            f"more: {self.group} has {words:,} words of that length, and at least {least:,} are needed to draw from",
        )
        self.require_seed()  # fmt: skip

    @property
    def order(self) -> int:
        """How many elements the group has."""
        return int(self.group[1:]) if self.group[0] == "Z" else len(_permutations(self.group))


def _permutations(group: str) -> list[tuple[int, ...]]:
    """All permutations of 0 to n - 1 in lexical order, or the even ones: the identity is the first."""
    found = permutations(range(int(group[1:])))
    return [p for p in found if group[0] == "S" or not _is_odd(p)]


def _is_odd(permutation: tuple[int, ...]) -> bool:
    inversions = sum(a > b for index, a in enumerate(permutation) for b in permutation[index + 1 :])
    return inversions % 2 == 1


def multiplication(group: str) -> np.ndarray:
    """int64 [n, n]: the element x · y of each two; element 0 is the identity. Of permutations, y is carried out first: (x · y)(i) = x(y(i)).

    >>> multiplication("Z3").tolist()
    [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    """
    if group[0] == "Z":
        elements = np.arange(int(group[1:]))
        return (elements[:, None] + elements) % len(elements)
    found = _permutations(group)
    number = {permutation: index for index, permutation in enumerate(found)}
    return np.array([[number[tuple(x[i] for i in y)] for y in found] for x in found])


class StateTrackingTask(TableTask):
    """``accuracy`` is that of states; ``accuracy_last`` that of the last one of a word, ``accuracy_word`` the share of words whose every state is right."""

    def __init__(self, options: StateTrackingOptions) -> None:
        table = multiplication(options.group)
        train = _words(options, "train", options.train_size, np.empty((0, options.length), dtype=np.uint8))
        held_out = _words(options, "held_out", options.held_out_size, train)
        super().__init__(
            name="state-tracking",
            train=_labelled(train, table),
            held_out=_labelled(held_out, table),
            description=f"Words of {options.length} elements of {options.group}, a label for the product up to each: {options.train_size:,} for training, "
            f"{options.held_out_size:,} others held out.",
            tokens_per_example=options.length,
            # The first state is its element; of the others, one element says nothing.
            chance=(1 + (options.length - 1) / len(table)) / options.length,
            model_fields={
                "architecture": "token_classification",
                "vocab_size": len(table),
                "num_labels": len(table),
                "causal": True,
            },
        )

    def measure(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """As every task, and how many words there are, how many end right, and how many are right throughout."""
        labels = batch["labels"].to(logits.device)
        right = (logits.argmax(-1) == labels) | (labels == IGNORED)
        words = torch.tensor(float(len(right)), dtype=torch.float64, device=logits.device)
        return super().measure(logits, batch) | {
            "words": words,
            "last": right[:, -1].double().sum(),
            "whole": right.all(dim=1).double().sum(),
        }

    def scores(self, totals: Mapping[str, float]) -> dict[str, float]:
        """The three accuracies, and the loss per state."""
        words = totals["words"]
        return super().scores(totals) | {
            "accuracy_last": totals["last"] / words,
            "accuracy_word": totals["whole"] / words,
        }


def _words(options: StateTrackingOptions, part: str, size: int, taken: np.ndarray) -> np.ndarray:
    """uint8 [size, length]: different words, none of them in ``taken``."""
    draws, found = generator(options.data_seed, part), taken
    while len(found) < len(taken) + size:
        drawn = draws.randint(0, options.order, size=(size, options.length)).astype(np.uint8)
        every = np.concatenate([found, drawn])
        # A word is one value of as many bytes; the first of equal ones is kept, in the order of drawing.
        _, firsts = np.unique(every.view(f"V{options.length}").ravel(), return_index=True)
        found = every[np.sort(firsts)]
    return found[len(taken) : len(taken) + size]


def _labelled(words: np.ndarray, table: np.ndarray) -> dict[str, Tensor]:
    states = np.empty_like(words)
    state = np.zeros(len(words), dtype=np.int64)
    for place in range(words.shape[1]):
        state = table[state, words[:, place]]
        states[:, place] = state
    return {"input_ids": torch.from_numpy(np.ascontiguousarray(words)), "labels": torch.from_numpy(states)}


KINDS = (
    TaskKind(
        name="state-tracking",
        summary="what the elements of a group so far multiply to: parity (Z2), Zn, S3, A5, S5",
        options=StateTrackingOptions,
        load=StateTrackingTask,
    ),
)
