"""Induction: at the end the trigger comes again, and what followed it the last time is due.

    4 2 # 7 1 3 # 5 0 4 #
                          5      <- what must be predicted next

Source: "Mamba" (arXiv:2312.00752, section 4.1 and appendix E.1), after H3 (arXiv:2212.14052): 256 tokens of 16 kinds, and a trigger that came once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from twofold.tasks.options import Options
from twofold.tasks.task import IGNORED, TableTask, TaskKind, apart, commonest_shown, distinct, generator


@dataclass(frozen=True, kw_only=True)
class InductionOptions(Options):
    """Of ``vocab_size`` tokens the last is the trigger, which stands ``num_triggers`` times before the end.

    ``length`` counts all tokens, the answer included. With more than one trigger the model must find the last: what followed the others is
    another token.
    """

    vocab_size: int = 16
    length: int = 256
    num_triggers: int = 1
    train_size: int = 20_000
    held_out_size: int = 1_000
    data_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "num_triggers", "train_size", "held_out_size")
        self.require("vocab_size", 3 <= self.vocab_size <= 32_767, "from 3 (two tokens and the trigger) to 32767")
        least = 2 * self.num_triggers + 2
        self.require(
            "length",
            self.length >= least,
            f"at least {least}: {self.num_triggers} triggers and what follows each, and both again",
        )
        self.require_seed()  # fmt: skip


def _load(options: InductionOptions) -> TableTask:
    train, held_out = apart(partial(_examples, options), options.train_size, options.held_out_size)
    tokens = held_out["input_ids"].numpy()
    return TableTask(
        name="induction",
        train=train,
        held_out=held_out,
        description=f"Induction: what followed the last of {options.num_triggers} triggers in {options.length} of {options.vocab_size} tokens, "
        f"{options.train_size:,} sequences for training, {options.held_out_size:,} held out.",
        tokens_per_example=options.length,
        chance=commonest_shown(tokens[:, :-2], tokens[:, -1:], options.vocab_size - 1),
        model_fields={"architecture": "causal_lm", "vocab_size": options.vocab_size, "causal": True},
    )


def _examples(options: InductionOptions, part: str, size: int) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``labels``, int16 [size, length]; the last label is scored and no other."""
    draws = generator(options.data_seed, part)
    trigger, count = options.vocab_size - 1, options.num_triggers
    tokens = draws.randint(0, trigger, size=(size, options.length))
    # Of (length - 2 - count) places for a trigger and its follower together, some in order; each moves those behind it by one.
    places = np.sort(distinct(draws, size, count, options.length - 2 - count), axis=1) + np.arange(count)
    followers = places + 1
    last = draws.randint(0, trigger, size=(size, 1))
    others = (last + draws.randint(1, trigger, size=(size, count - 1))) % trigger
    np.put_along_axis(tokens, followers, np.concatenate([others, last], axis=1), axis=1)
    np.put_along_axis(tokens, places, trigger, axis=1)
    tokens[:, -2] = trigger
    tokens[:, -1] = last[:, 0]
    labels = np.full_like(tokens, IGNORED)
    labels[:, -1] = tokens[:, -1]
    return {"input_ids": torch.from_numpy(tokens.astype(np.int16)), "labels": torch.from_numpy(labels.astype(np.int16))}


KINDS = (
    TaskKind(
        name="induction",
        summary="what followed the trigger the last time that it came (induction heads)",
        options=InductionOptions,
        load=_load,
    ),
)
