"""Multi-hop look-up: facts lead from one name to the next, and a question asks where so many steps lead.

    a b   c a   b d   d c   | 2 a ?    1 c ?
                                  d        a      <- due as the next token

The names are in a ring, so no name is an end or a beginning and nothing but the steps gives the answer. The facts stand in any order.
Relatives: RULER's variable tracking (arXiv:2404.06654: one chain of four steps), whose end can be told by its place in the chain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from twofold.tasks.facts import FactsTask, rings
from twofold.tasks.options import Options
from twofold.tasks.task import IGNORED, Batch, TaskKind, apart, distinct, generator

BLANK = 0
QUESTION_TOKENS = 3


@dataclass(frozen=True, kw_only=True)
class MultihopOptions(Options):
    """``num_entities`` of ``vocab_entities`` names are in the ring; each of ``num_questions`` asks for ``min_hops`` to ``max_hops`` steps from a name."""

    vocab_entities: int = 64
    num_entities: int = 8
    num_questions: int = 4
    min_hops: int = 1
    max_hops: int = 3
    train_size: int = 100_000
    held_out_size: int = 2_000
    data_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "num_questions", "min_hops", "train_size", "held_out_size")
        self.require("vocab_entities", self.vocab_entities <= 30_000, "at most 30000")
        self.require("num_entities", 2 <= self.num_entities <= self.vocab_entities, f"from 2 to {self.vocab_entities}, the number of names")  # fmt: skip
        self.require("max_hops", self.min_hops <= self.max_hops < self.num_entities, f"from min_hops = {self.min_hops} to {self.num_entities - 1}: more steps lead around the ring")  # fmt: skip
        self.require("num_questions", self.num_questions <= self.num_entities, f"at most {self.num_entities}: each is about another name")  # fmt: skip
        self.require_seed()

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return 2 * self.num_entities + QUESTION_TOKENS * self.num_questions


class MultihopTask(FactsTask):
    """``accuracy_1``, ``accuracy_2``, ...: that of questions with so many steps. Token h asks for h steps; names come after the largest."""

    def __init__(self, options: MultihopOptions) -> None:
        self._options = options
        train, held_out = apart(partial(_examples, options), options.train_size, options.held_out_size)
        super().__init__(
            name="multihop",
            train=train,
            held_out=held_out,
            description=f"Where {options.min_hops} to {options.max_hops} steps lead in a ring of {options.num_entities} names, {options.num_questions} "
            f"questions; {options.train_size:,} sequences for training, {options.held_out_size:,} held out.",
            tokens_per_example=options.length,
            chance=1 / (options.num_entities - 1),
            model_fields={
                "architecture": "causal_lm",
                "vocab_size": 1 + options.max_hops + options.vocab_entities,
                "causal": True,
            },
        )

    def kind_masks(self, batch: Batch) -> Mapping[str, Tensor]:
        """The number of steps stands right before the name."""
        hops = batch["input_ids"].roll(1, dims=1)
        return {str(h): hops == h for h in range(self._options.min_hops, self._options.max_hops + 1)}


def _examples(options: MultihopOptions, part: str, size: int) -> dict[str, Tensor]:
    """``input_ids`` and ``labels``, int16 [size, length]. A blank stands where an answer is due."""
    draws = generator(options.data_seed, part)
    count = options.num_entities
    names = 1 + options.max_hops + distinct(draws, size, count, options.vocab_entities)
    following = rings(draws, size, count)
    facts = np.stack([names, np.take_along_axis(names, following, axis=1)], axis=2)
    # The names are in no order already, and so are the facts.
    start = distinct(draws, size, options.num_questions, count)
    hops = draws.randint(options.min_hops, options.max_hops + 1, size=start.shape)
    end = start
    for hop in range(options.max_hops):
        end = np.where(hop < hops, np.take_along_axis(following, end, axis=1), end)
    questions = np.stack([hops, np.take_along_axis(names, start, axis=1), np.full_like(hops, BLANK)], axis=2)
    tokens = np.concatenate([facts.reshape(size, -1), questions.reshape(size, -1)], axis=1)
    labels = np.full_like(tokens, IGNORED)
    labels[:, 2 * count + QUESTION_TOKENS - 1 :: QUESTION_TOKENS] = np.take_along_axis(names, end, axis=1)
    return {"input_ids": torch.from_numpy(tokens.astype(np.int16)), "labels": torch.from_numpy(labels.astype(np.int16))}


KINDS = (
    TaskKind(
        name="multihop",
        summary="where so many steps lead from a name, by facts in any order",
        options=MultihopOptions,
        load=MultihopTask,
    ),
)
