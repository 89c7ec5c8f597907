"""Directional relations: facts such as "a beats b", then questions in either direction.

    a BEATS b   c BEATS a   b BEATS c   | BEATS WHOM a ?   BEATS WHO a ?
                                                       b               c      <- due as the next token

The names of a relation are in a ring, so each beats one and is beaten by one: a reader who lost the direction of a fact has to guess between
two. In training, the last half of the relations is asked about in one direction only (WHOM); when held out, in both, and the score
of what was never asked so is apart (``accuracy_unseen``). Several relations hold among the same names at once.
The task is this project's own: logits that are symmetric (Q = K) let token i look at j exactly as j looks at i, and what this does to
directed facts is an open question (encoders profit from symmetric logits and decoders do not, 2406.06366 and 2502.10927).
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

BLANK, WHOM, WHO = 0, 1, 2
FIRST_RELATION = 3
FACT_TOKENS, QUESTION_TOKENS = 3, 4


@dataclass(frozen=True, kw_only=True)
class RelationsOptions(Options):
    """Of ``vocab_relations`` relations ``num_relations`` hold in a sequence, each among the same ``num_entities`` of ``vocab_entities`` names.

    A sequence has a fact for each of them, in any order, and ``num_questions`` different questions.
    """

    vocab_entities: int = 64
    vocab_relations: int = 8
    num_entities: int = 6
    num_relations: int = 2
    num_questions: int = 6
    train_size: int = 100_000
    held_out_size: int = 2_000
    data_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "num_questions", "train_size", "held_out_size")
        self.require("num_entities", 3 <= self.num_entities <= self.vocab_entities, f"from 3 (in a ring of two, direction is lost) to {self.vocab_entities}, the number of names")  # fmt: skip
        self.require("vocab_relations", 2 <= self.vocab_relations <= 1_000, "from 2 to 1000")
        self.require("vocab_entities", self.vocab_entities <= 30_000, "at most 30000")
        self.require("num_relations", 1 <= self.num_relations <= self.vocab_relations, f"from 1 to {self.vocab_relations}, the number of relations")  # fmt: skip
        most = self.num_relations * self.num_entities
        self.require(
            "num_questions", self.num_questions <= most, f"at most {most}: that many can be asked in one direction"
        )
        self.require_seed()

    @property
    def first_entity(self) -> int:
        """The first token that is a name."""
        return FIRST_RELATION + self.vocab_relations

    @property
    def first_unseen(self) -> int:
        """The first relation's token that training asks about in one direction only."""
        return FIRST_RELATION + self.vocab_relations // 2

    @property
    def num_fact_tokens(self) -> int:
        """Tokens before the first question."""
        return FACT_TOKENS * self.num_relations * self.num_entities

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.num_fact_tokens + QUESTION_TOKENS * self.num_questions


class RelationsTask(FactsTask):
    """Scores of each direction; ``accuracy_unseen`` is that of relations which training never asked WHO.

    ``reversed`` is the share of all answers that name the one on the other side of the one asked about: the direction was lost.
    """

    def __init__(self, options: RelationsOptions) -> None:
        self._options = options
        train, held_out = apart(partial(_examples, options), options.train_size, options.held_out_size)
        super().__init__(
            name="relations",
            train=train,
            held_out=held_out,
            description=f"Who beats whom, asked in both directions: {options.num_relations} relations in rings of {options.num_entities} names, "
            f"{options.num_questions} questions; {options.train_size:,} sequences for training, {options.held_out_size:,} held out.",
            tokens_per_example=options.length,
            chance=1 / (options.num_entities - 1),
            model_fields={
                "architecture": "causal_lm",
                "vocab_size": options.first_entity + options.vocab_entities,
                "causal": True,
            },
        )

    def kind_masks(self, batch: Batch) -> Mapping[str, Tensor]:
        """The direction stands right before the name that is asked about, the relation before the direction."""
        tokens = batch["input_ids"]
        direction, relation = tokens.roll(1, dims=1), tokens.roll(2, dims=1)
        who = direction == WHO
        return {"whom": direction == WHOM, "who": who, "unseen": who & (relation >= self._options.first_unseen)}

    def measure(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """As every task of facts, and how many answers name the opposite."""
        guesses = logits[:, :-1].argmax(-1)
        opposite = self.opposites(batch)[:, :-1].to(logits.device)
        return super().measure(logits, batch) | {"reversed": (guesses == opposite).double().sum()}

    def scores(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Those of all tasks of facts, and ``reversed``."""
        return super().scores(totals) | {"reversed": totals["reversed"] / totals["count"]}

    def opposites(self, batch: Batch) -> Tensor:
        """[B, T]: at the last token of each question the answer of the other direction, elsewhere IGNORED; read from the facts."""
        tokens, first = batch["input_ids"], self._options.num_fact_tokens
        winner, relation, loser = tokens[:, :first].unflatten(1, (-1, FACT_TOKENS)).unbind(-1)
        found = torch.full_like(tokens, IGNORED)
        for start in range(first, tokens.shape[1], QUESTION_TOKENS):
            asked, direction, name = tokens[:, start : start + 3].unbind(1)
            whom = (direction == WHOM)[:, None]
            sought, told = torch.where(whom, loser, winner), torch.where(whom, winner, loser)
            fact = ((relation == asked[:, None]) & (sought == name[:, None])).long().argmax(dim=1, keepdim=True)
            found[:, start + 2] = told.gather(1, fact)[:, 0]
        return found


def _examples(options: RelationsOptions, part: str, size: int) -> dict[str, Tensor]:
    """``input_ids`` and ``labels``, int16 [size, length]. A blank stands where an answer is due."""
    draws = generator(options.data_seed, part)
    count, relations = options.num_entities, options.num_relations
    names = options.first_entity + distinct(draws, size, count, options.vocab_entities)
    relation = FIRST_RELATION + distinct(draws, size, relations, options.vocab_relations)
    beats = np.stack([rings(draws, size, count) for _ in range(relations)], axis=1)  # [size, relations, count]
    beaten_by = beats.argsort(axis=2)

    loser = np.take_along_axis(names, beats.reshape(size, -1), axis=1)
    facts = np.stack([np.tile(names, relations), relation.repeat(count, axis=1), loser], axis=2)
    order = draws.random_sample((size, relations * count)).argsort(axis=1, kind="stable")
    facts = np.take_along_axis(facts, order[:, :, None], axis=1)

    # A question is a relation and a name, and then a direction.
    chosen = distinct(draws, size, options.num_questions, relations * count)
    asked, name = chosen // count, chosen % count
    asked_token = np.take_along_axis(relation, asked, axis=1)
    is_who = draws.randint(0, 2, size=chosen.shape) == 1
    if part.startswith("train"):
        is_who &= asked_token < options.first_unseen
    rows = np.arange(size)[:, None]
    answer = np.where(is_who, beaten_by[rows, asked, name], beats[rows, asked, name])
    questions = np.stack(
        [asked_token, np.where(is_who, WHO, WHOM), np.take_along_axis(names, name, axis=1), np.full_like(name, BLANK)],
        axis=2,
    )
    tokens = np.concatenate([facts.reshape(size, -1), questions.reshape(size, -1)], axis=1)
    labels = np.full_like(tokens, IGNORED)
    labels[:, options.num_fact_tokens + QUESTION_TOKENS - 1 :: QUESTION_TOKENS] = np.take_along_axis(
        names, answer, axis=1
    )
    return {"input_ids": torch.from_numpy(tokens.astype(np.int16)), "labels": torch.from_numpy(labels.astype(np.int16))}


KINDS = (
    TaskKind(
        name="relations",
        summary="who beats whom: facts with a direction, asked in the other direction too",
        options=RelationsOptions,
        load=RelationsTask,
    ),
)
