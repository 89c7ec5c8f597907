"""Causal associative recall with many queries: pairs of a key and its value, then some of the keys again; after each, its value is due.

    key value key value | . . key . key . .
                               value value      <- what must be predicted next

The paper's strongest known failure of K=V is on recall by an encoder with several heads; this is the causal form. There is one generator
and two names for it: ``recall``, which leaves the model's positions free, and ``mqar``, the setting of the published figure, where
positions are learned and nothing but queries stands behind the pairs.
Source: MQAR of "Zoology: Measuring and Improving Recall in Efficient Language Models" (arXiv:2312.04927, section 4, its
published generator, and the settings of its figure 2), whose smallest setting the defaults are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twofold.tasks.buckets import buckets, ranges_in, sums
from twofold.tasks.options import Options
from twofold.tasks.task import IGNORED, Batch, TableTask, TaskKind, apart, distinct, generator

BLANK = 0
"""The token between queries, if they are not drawn at random."""


@dataclass(frozen=True, kw_only=True)
class RecallOptions(Options):
    """``length`` tokens begin with ``num_pairs`` pairs; each key is asked for once, at an even distance behind the pairs.

    Slot g of the queries' slots (counted from 1, two tokens each) is taken with a probability proportional to g^(power - 1): 1 is uniform,
    and near 0 most queries follow the pairs closely, as repeated word pairs do in text. With ``random_fillers`` the tokens between
    queries are drawn from the whole vocabulary, else they are :data:`BLANK`. ``by_distance`` adds the accuracy of queries that stand so many
    tokens behind their key: ``accuracy@16-31``, and so on in powers of two.
    """

    vocab_size: int = 8192
    num_pairs: int = 4
    length: int = 64
    power: float = 0.01
    random_fillers: bool = True
    train_size: int = 100_000
    held_out_size: int = 3_000
    data_seed: int = 0
    by_distance: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "num_pairs", "train_size", "held_out_size")
        self.require_seed()
        self.require("power", self.power > 0, "more than 0")
        self.require("length", self.length % 2 == 0, "even: pairs and queries take two tokens each")
        self.require(
            "length",
            self.length >= 4 * self.num_pairs,
            f"at least {4 * self.num_pairs}, 4 for each of the {self.num_pairs} pairs",
        )
        self.require("vocab_size", self.vocab_size >= 2 * self.num_pairs + 2, f"at least {2 * self.num_pairs + 2}: a blank, and keys and values for {self.num_pairs} pairs")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MqarOptions(RecallOptions):
    """Those of recall, as the published figure sets them: blanks between queries.

    The figure's pairs of ``length`` and ``num_pairs`` are 64 and 4, 128 and 8, 256 and 16, 512 and 64.
    """

    random_fillers: bool = False


class RecallTask(TableTask):
    """Keys are tokens 1 to V/2 - 1, values V/2 to V - 1. Only the values that are due are scored.

    A causal_lm compares its logits at t with the label at t + 1, so the value due after a query at t is the label at t + 1, whatever token
    stands there.
    """

    def __init__(self, options: RecallOptions, name: str = "recall", **model_fields: Any) -> None:
        train, held_out = apart(partial(_examples, options), options.train_size, options.held_out_size)
        super().__init__(
            name=name,
            train=train,
            held_out=held_out,
            description=f"Associative recall in MQAR's manner: {options.num_pairs} pairs in {options.length} of {options.vocab_size:,} tokens, "
            f"{options.train_size:,} sequences for training, {options.held_out_size:,} held out.",
            tokens_per_example=options.length,
            chance=1 / options.num_pairs,
            model_fields={"architecture": "causal_lm", "vocab_size": options.vocab_size, "causal": True} | model_fields,
        )
        self._num_pairs = options.num_pairs
        self._buckets = buckets(2, options.length - 2, start=4) if options.by_distance else []

    def measure(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """As every task; where asked for, also how many queries of each distance there are and how many are answered right."""
        found = super().measure(logits, batch)
        if self._buckets:
            predictions, targets = self.predictions(logits, batch)
            asked = targets != IGNORED
            right = asked & (predictions.argmax(-1) == targets)
            found |= sums(self._distances(batch).to(asked.device), {"asked": asked, "right": right}, self._buckets)
        return found

    def _distances(self, batch: Batch) -> Tensor:
        """int64 [B, T - 1]: how many tokens before each token its own key stands among the pairs; 0 where it is no key of theirs."""
        tokens = batch["input_ids"][:, :-1]
        keys = tokens[:, 0 : 2 * self._num_pairs : 2]
        is_key = tokens[:, :, None] == keys[:, None, :]  # at most one of them: keys are distinct
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return torch.where(is_key, places[:, None] - places[0 : 2 * self._num_pairs : 2], 0).sum(dim=2)

    def scores(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Loss and accuracy, and the accuracy of each distance that is asked."""
        found = super().scores(totals)
        for place, count in ranges_in(totals, "asked"):
            if count:
                found[f"accuracy@{place}"] = totals[f"right@{place}"] / count
        return found


def _examples(options: RecallOptions, part: str, size: int) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``labels``, int32 [size, length]."""
    draws = generator(options.data_seed, part)
    first_value = options.vocab_size // 2
    keys = 1 + distinct(draws, size, options.num_pairs, first_value - 1)
    values = first_value + distinct(draws, size, options.num_pairs, options.vocab_size - first_value)
    num_slots = options.length // 2 - options.num_pairs
    query_places = 2 * options.num_pairs + 2 * _slots(draws, options, size, num_slots)

    if options.random_fillers:
        tokens = draws.randint(0, options.vocab_size, size=(size, options.length))
    else:
        tokens = np.full((size, options.length), BLANK)
    tokens[:, 0 : 2 * options.num_pairs : 2] = keys
    tokens[:, 1 : 2 * options.num_pairs : 2] = values
    np.put_along_axis(tokens, query_places, keys, axis=1)
    labels = np.full((size, options.length), IGNORED)
    np.put_along_axis(labels, query_places + 1, values, axis=1)
    return {"input_ids": torch.from_numpy(tokens.astype(np.int32)), "labels": torch.from_numpy(labels.astype(np.int32))}


def _slots(draws: np.random.RandomState, options: RecallOptions, size: int, num_slots: int) -> np.ndarray:
    """For each pair a slot of its own, drawn one after another without replacement, [size, num_pairs].

    The order of log p + Gumbel noise is the order of such draws. Source: Efraimidis and Spirakis, 2006, in logarithms.
    """
    log_weights = (options.power - 1) * np.log(np.arange(1, num_slots + 1))
    return np.argsort(-(log_weights + draws.gumbel(size=(size, num_slots))), axis=1, kind="stable")[
        :, : options.num_pairs
    ]


def _mqar(options: MqarOptions) -> RecallTask:
    return RecallTask(options, "mqar", positions={"kind": "learned", "length": options.length})


KINDS = (
    TaskKind(
        name="recall",
        summary="the value of a key that was seen before, by a causal model (MQAR)",
        options=RecallOptions,
        load=RecallTask,
    ),
    TaskKind(
        name="mqar",
        summary="recall in the setting of MQAR's published figure: learned positions, blanks between queries",
        options=MqarOptions,
        load=_mqar,
    ),
)
