"""What a task is: data, the loss by which variants are compared, and a score.

The training loss is the model's own, cross-entropy over the labels that are not -100; a task says which labels those are, counts them, and
turns a model's logits into sums that can be added over batches and processes before they become metrics.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from twofold.errors import TwofoldError
from twofold.tasks.options import Options

IGNORED = -100
"""The label of a prediction that is not scored, as in all of Transformers."""

MAX_REDRAWS = 100

Batch = dict[str, Tensor]
Part = Mapping[str, Tensor]


class Task(ABC):
    """Data, loss and score. ``model_fields`` are the fields of a ModelSpec that the task dictates.

    ``loss_metric`` names the metric of comparison (lower is better), ``score`` the headline metric, of which ``higher_is_better``;
    :meth:`scores` holds both. ``tokens_per_example`` counts the positions that a model computes for one example. ``data_hash`` is the SHA-256
    of the training and the held-out data. ``chance`` is the score, a share of right answers, of the best guess that does not use what was asked (None:
    not known). Nothing here depends on anything but the task's options and the files they name.
    """

    loss_metric: ClassVar[str] = "loss"
    score: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    def __init__(
        self,
        *,
        name: str,
        model_fields: Mapping[str, Any],
        description: str,
        train_size: int,
        held_out_size: int,
        tokens_per_example: int,
        data_hash: str,
        chance: float | None = None,
    ) -> None:
        self.name = name
        self.model_fields = model_fields
        self.description = description
        self.train_size = train_size
        self.held_out_size = held_out_size
        self.tokens_per_example = tokens_per_example
        self.data_hash = data_hash
        self.chance = chance

    @abstractmethod
    def train_batch(self, indices: Tensor) -> Batch:
        """Training examples ``indices`` [B] (from 0 up to ``train_size``) as the model's keyword arguments, on the CPU; a pure function."""

    @abstractmethod
    def held_out_batches(self, batch_size: int) -> Iterator[Batch]:
        """Every held-out example once, in one order, at most ``batch_size`` together."""

    def targets(self, batch: Batch) -> Tensor:
        """The labels that line up with a model's predictions: [B, T - 1] of a causal_lm, which predicts the next one, else as they are."""
        labels = batch["labels"]
        return labels[:, 1:] if self.model_fields["architecture"] == "causal_lm" else labels

    def count(self, batch: Batch) -> int:
        """How many predictions of the batch are scored; counts of micro-batches add up to that of their step."""
        return int((self.targets(batch) != IGNORED).sum())

    def predictions(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The logits that are scored, [B, T, N] (of an image [B, N]) in float32 or float64, and the targets they line up with, on their device."""
        targets = self.targets(batch).to(logits.device)
        predictions = logits[:, : targets.shape[1]] if targets.ndim == 2 else logits
        return (predictions.float() if predictions.dtype in (torch.float16, torch.bfloat16) else predictions), targets

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """The cross-entropy of every prediction in nats, as the targets are laid out; 0 where the target is ignored."""
        predictions, targets = self.predictions(logits, batch)
        losses = F.cross_entropy(predictions.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none")
        return losses.view(targets.shape)

    def measure(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """float64 sums over the batch's scored predictions: their cross-entropy in nats, how many are right, how many they are.

        ``logits`` [B, T, N] (of an image [B, N]) are the model's for this batch.
        """
        predictions, targets = self.predictions(logits, batch)
        scored = targets != IGNORED
        right = (predictions.argmax(-1) == targets) & scored
        return {
            "loss": self.losses(logits, batch).double().sum(),
            "correct": right.double().sum(),
            "count": scored.double().sum(),
        }

    def scores(self, totals: Mapping[str, float]) -> dict[str, float]:
        """The metrics, from :meth:`measure`'s sums over all batches."""
        return {"loss": totals["loss"] / totals["count"], "accuracy": totals["correct"] / totals["count"]}


class TableTask(Task):
    """A task whose examples are rows: every column is a tensor with one row for each example, ``labels`` among them.

    Columns may be of small integers; :meth:`batch` widens them to what a model reads.
    """

    def __init__(self, *, train: Part, held_out: Part, **facts: Any) -> None:
        sizes = {"train_size": len(train["labels"]), "held_out_size": len(held_out["labels"])}
        super().__init__(**{"data_hash": data_hash(train=train, held_out=held_out)} | sizes | facts)
        self.train, self.held_out = train, held_out

    def batch(self, part: Part, rows: Tensor) -> Batch:
        """Those rows of the training or the held-out part, as the model's keyword arguments."""
        return {name: _widened(column[rows]) for name, column in part.items()}

    def train_batch(self, indices: Tensor) -> Batch:
        """Rows ``indices`` of the training part."""
        return self.batch(self.train, indices)

    def held_out_batches(self, batch_size: int) -> Iterator[Batch]:
        """The rows of the held-out part, in their order."""
        for rows in torch.arange(self.held_out_size).split(batch_size):
            yield self.batch(self.held_out, rows)


def _widened(column: Tensor) -> Tensor:
    return column if column.is_floating_point() else column.long()


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """An entry of the registry: a name, one sentence, the options it takes, and how it is loaded from them."""

    name: str
    summary: str
    options: type[Options]
    load: Callable[[Any], Task]


def data_hash(**parts: Part) -> str:
    """SHA-256 over names, types, shapes and bytes of all columns of all parts."""
    digest = hashlib.sha256()
    for part, columns in parts.items():
        for name, column in columns.items():
            digest.update(f"{part}.{name} {column.dtype} {tuple(column.shape)}\n".encode())
            digest.update(column.contiguous().numpy().data)
    return digest.hexdigest()


def generator(data_seed: int, part: str) -> np.random.RandomState:
    """Random numbers for one part of one task's data.

    NumPy freezes the stream of this generator and of no other, so the same seed gives the same data (and the same hash) everywhere and always.
    """
    return np.random.RandomState([data_seed, *part.encode()])


def apart(
    draw: Callable[[str, int], dict[str, Tensor]], train_size: int, held_out_size: int, *, key: str = "input_ids"
) -> tuple[Part, Part]:
    """The training and the held-out part, with no row of the column ``key`` in both.

    ``draw`` takes the name of a part, from which its random numbers come, and how many rows are wanted. Held-out rows are as they are drawn; a training
    row that is among them is drawn again, as part ``train 0``, ``train 1``, ... Raises TwofoldError where nearly all that can be drawn is held out.
    """
    held_out, train = draw("held_out", held_out_size), draw("train", train_size)
    known = {row.tobytes() for row in held_out[key].numpy()}
    places = np.arange(train_size)
    for again in range(MAX_REDRAWS):
        rows = train[key].numpy()
        places = np.array([place for place in places if rows[place].tobytes() in known], dtype=np.int64)
        if not len(places):
            return train, held_out
        for name, column in draw(f"train {again}", len(places)).items():
            train[name][places] = column
    raise TwofoldError(
        f"After {MAX_REDRAWS} draws {len(places):,} of {train_size:,} training examples are still among those held out: "
        "hold fewer out, or allow longer sequences or more kinds of tokens."
    )


def distinct(draws: np.random.RandomState, rows: int, count: int, below: int) -> np.ndarray:
    """``rows`` ordered samples of ``count`` different numbers from 0 up to ``below``, all equally likely; int64 [rows, count].

    Floyd's sampling, a column at a time: the j-th draw is from the first ``below - count + j + 1`` numbers, and stands for the last of them if
    it is already there. That gives a uniform set, and shuffling it a uniform order. Source: Bentley and Floyd, CACM 30(9), 1987.
    """
    chosen = np.empty((rows, count), dtype=np.int64)
    for j in range(count):
        last = below - count + j
        draw = draws.randint(0, last + 1, size=rows)
        taken = (chosen[:, :j] == draw[:, None]).any(axis=1)
        chosen[:, j] = np.where(taken, last, draw)
    order = draws.random_sample((rows, count)).argsort(axis=1, kind="stable")
    return np.take_along_axis(chosen, order, axis=1)


def commonest_so_far(tokens: np.ndarray, labels: np.ndarray, allowed: np.ndarray | None = None) -> float:
    """The share of scored tokens that are the one which was due most often before, in their own row: a guess that looks nothing up.

    ``tokens`` [N, T] are whole numbers; ``labels`` [N, T] are tokens where they are scored and IGNORED elsewhere. Any token counts that was
    scored anywhere. Of several that are equally common, and before any came, the smallest is guessed. With ``allowed`` [N, T, V] a
    guess is right if it is allowed.
    """
    rows = np.arange(len(tokens))
    answers = np.unique(labels[labels != IGNORED])
    counts = np.zeros((len(tokens), int(answers.max()) + 1), dtype=np.int64)
    right = 0
    for place in range(tokens.shape[1]):
        due = labels[:, place] != IGNORED
        guess = answers[counts[:, answers].argmax(axis=1)]
        is_right = guess == labels[:, place] if allowed is None else allowed[rows, place, guess]
        right += int((is_right & due).sum())
        token = tokens[:, place].astype(np.int64)
        counts[rows, np.minimum(token, counts.shape[1] - 1)] += np.isin(token, answers)
    return right / int((labels != IGNORED).sum())


def commonest_shown(tokens: np.ndarray, answers: np.ndarray, kinds: int) -> float:
    """The share of ``answers`` [N, A] that are the commonest of the first ``kinds`` tokens in their row of ``tokens`` [N, T].

    That is a guess that uses all that is shown and nothing of what is asked. Of several that are equally common the smallest is guessed.
    """
    guesses = [np.bincount(row[row < kinds], minlength=kinds).argmax() for row in tokens]
    return float((answers == np.array(guesses)[:, None]).mean())
