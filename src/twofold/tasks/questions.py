"""What the reasoning tasks share: questions and answers as text, read as bytes, of which only the answer is scored.

    reverse sort 3142=4321⏎........        the label of every byte of "4321⏎", no other; what pads a row is never scored

``exact_match`` is the share of questions whose whole answer, its ending line break included, is right. It is measured in one pass over the
right text, and yet is what greedy decoding would score. Let a be the answer, of n bytes. If every prediction is right where a model is given the
prompt and a's bytes so far, greedy decoding writes a₁ after the prompt, so its second prediction is given the prompt and a₁, is right, and so on:
it writes a. If some prediction is wrong, let the i-th be the first: up to there decoding has written a₁ … aᵢ₋₁ by the same argument, so it is
given what the pass was given, and writes something else than aᵢ. So the two events are one. (A causal model is assumed, whose prediction
does not depend on what comes later.)

No question of the held-out part is in the training part. Questions that ask the same in other words, as 3+4 and 4+3 do, are one, by ``key``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.tasks.options import Options
from twofold.tasks.task import IGNORED, Batch, TableTask, generator

VOCABULARY = 256
PADDING = 0
END = "\n"
MAX_FAILURES = 1_000
BLOCK = 65_536

Thing = TypeVar("Thing")


@dataclass(frozen=True, kw_only=True)
class Question:
    """``prompt`` and ``answer`` are ASCII. Questions of one ``key`` ask the same; ``kind`` is what scores are told apart by.

    ``form`` is what somebody sees who does not think: the function's name, say. The chance level is that of the best answer to each form.
    """

    prompt: str
    answer: str
    key: str
    kind: str
    form: str = ""


class Draws:
    """Whole numbers at random, from a stream that NumPy freezes; a block at a time, because questions are made one by one."""

    def __init__(self, stream: np.random.RandomState) -> None:
        self._stream, self._block = stream, list[float]()

    def below(self, end: int) -> int:
        """One of 0 to ``end`` - 1."""
        if not self._block:
            self._block = self._stream.random_sample(BLOCK).tolist()
        return int(self._block.pop() * end)

    def between(self, first: int, last: int) -> int:
        """One of ``first`` to ``last``, both included."""
        return first + self.below(last - first + 1)

    def one_of(self, things: Sequence[Thing]) -> Thing:
        """One of several."""
        return things[self.below(len(things))]

    def some_of(self, things: Sequence[Thing], count: int) -> list[Thing]:
        """``count`` different ones in random order: the first places of a Fisher-Yates shuffle."""
        left = list(things)
        for place in range(count):
            other = self.between(place, len(left) - 1)
            left[place], left[other] = left[other], left[place]
        return left[:count]


@dataclass(frozen=True, kw_only=True)
class QuestionOptions(Options, ABC):
    """How many questions there are of each part, and a way to draw one."""

    train_size: int = 20_000
    held_out_size: int = 500
    data_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "train_size", "held_out_size")
        self.require_seed()

    @abstractmethod
    def draw(self, draws: Draws) -> Question:
        """A question at random."""

    def chance(self, questions: Sequence[Question]) -> float:
        """The exact match of the best guess that does not use what is asked: the commonest answer to each form of ``questions``, unless a task knows better."""
        return constant_guess(questions)


class QuestionTask(TableTask):
    """``accuracy`` is that of single bytes of answers, ``exact_match`` that of whole answers, ``exact_match_KIND`` that of each kind.

    ``questions`` are those held out, in the order of the rows. ``chance`` is what the options say of the training part.
    """

    score: ClassVar[str] = "exact_match"

    def __init__(self, *, name: str, options: QuestionOptions, what: str) -> None:
        held_out = _drawn(options, "held_out", options.held_out_size, name, frozenset(), distinct=True)
        keys = frozenset(question.key for question in held_out)
        train = _drawn(options, "train", options.train_size, name, keys, distinct=False)
        length = max(len(text(question)) for question in (*held_out, *train))
        self.questions: Sequence[Question] = held_out
        rows = _rows(held_out, length)
        self._kinds = {
            row.tobytes(): question.kind for row, question in zip(rows["input_ids"].numpy(), held_out, strict=True)
        }
        super().__init__(
            name=name,
            train=_rows(train, length),
            held_out=rows,
            description=f"{what}: {len({question.key for question in train}):,} different questions for training, {len(held_out):,} others held out.",
            tokens_per_example=length,
            chance=options.chance(train),
            model_fields={"architecture": "causal_lm", "vocab_size": VOCABULARY, "causal": True},
        )

    def measure(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """As every task, and of all and of each kind how many questions there are and how many are answered right as a whole."""
        targets = self.targets(batch).to(logits.device)
        whole = ((logits[:, :-1].argmax(-1) == targets) | (targets == IGNORED)).all(dim=1).double()
        found = super().measure(logits, batch) | {"asked": torch.ones_like(whole).sum(), "right": whole.sum()}
        rows = batch["input_ids"].cpu().numpy().astype(np.uint8)
        kinds = [self._kinds.get(row.tobytes(), "") for row in rows]
        for kind in sorted(set(self._kinds.values())):
            own = torch.tensor([name == kind for name in kinds], dtype=torch.float64, device=logits.device)
            found |= {f"asked_{kind}": own.sum(), f"right_{kind}": (own * whole).sum()}
        return found

    def scores(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Loss and accuracy per byte of the answers, exact match per question."""
        kinds = (name.removeprefix("asked_") for name in totals if name.startswith("asked_"))
        of_kinds = {f"exact_match_{kind}": totals[f"right_{kind}"] / totals[f"asked_{kind}"] for kind in kinds if totals[f"asked_{kind}"]}  # fmt: skip
        return super().scores(totals) | {"exact_match": totals["right"] / totals["asked"]} | of_kinds


def text(question: Question) -> str:
    """Prompt, answer and the line break that ends it."""
    return question.prompt + question.answer + END


def constant_guess(questions: Sequence[Question]) -> float:
    """The share that is right if always the answer is given that is most frequent among questions of the same form."""
    answers: dict[str, Counter[str]] = {}
    for question in questions:
        answers.setdefault(question.form, Counter())[question.answer] += 1
    return sum(max(counts.values()) for counts in answers.values()) / len(questions)


def _drawn(
    options: QuestionOptions, part: str, size: int, name: str, taken: frozenset[str], *, distinct: bool
) -> list[Question]:
    """Questions whose keys are not ``taken``, all different where they must be. Raises TwofoldError where there are too few."""
    draws, found, seen, failures = Draws(generator(options.data_seed, part)), list[Question](), set(taken), 0
    while len(found) < size:
        question = options.draw(draws)
        if question.key in seen:
            failures += 1
            if failures > MAX_FAILURES:
                raise TwofoldError(
                    f"Task {name}: after {len(found):,} questions for the {part.replace('_', '-')} part no new ones are found: "
                    "ask for fewer held-out ones, or allow larger questions."
                )
            continue
        if distinct:
            seen.add(question.key)
        found.append(question)
        failures = 0
    return found


def _rows(questions: Sequence[Question], length: int) -> dict[str, Tensor]:
    """``input_ids`` uint8 and ``labels`` int16, both [len(questions), length]."""
    tokens = np.full((len(questions), length), PADDING, dtype=np.uint8)
    labels = np.full((len(questions), length), IGNORED, dtype=np.int16)
    for row, question in enumerate(questions):
        written, start = text(question).encode("ascii"), len(question.prompt)
        tokens[row, : len(written)] = np.frombuffer(written, dtype=np.uint8)
        labels[row, start : len(written)] = tokens[row, start : len(written)]
    return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}
