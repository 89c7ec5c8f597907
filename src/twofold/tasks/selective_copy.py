"""Selective copying: some tokens stand among blanks, and behind them all they are to be said again, in their order.

    3 . . 1 . 7 .  # # #
                   3 1 7      <- the label at each place, of which only these are scored

There are two published settings. Mamba's has the tokens anywhere and a mark at each place where an answer is due; MAD's puts every blank
before a token that is drawn for it, then a single mark, and blanks where the answers are due.
Sources: "Mamba" (arXiv:2312.00752, section 4.1 and appendix E.1: 4,096 tokens of 16 kinds, 16 to be copied); MAD (arXiv:2403.17844, its
published generator and configuration: 256 tokens of 16 kinds, 16 to be copied, 12,800 sequences).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from twofold.tasks.options import Options
from twofold.tasks.task import IGNORED, TableTask, TaskKind, apart, commonest_shown, distinct, generator


@dataclass(frozen=True, kw_only=True)
class SelectiveCopyOptions(Options):
    """``num_tokens`` of the ``length`` tokens are to be copied. Of ``vocab_size`` tokens the last two are the blank and the mark.

    Mamba drew new sequences for ever; ``train_size`` says how many there are here.
    """

    vocab_size: int = 16
    length: int = 4096
    num_tokens: int = 16
    train_size: int = 10_000
    held_out_size: int = 500
    data_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "num_tokens", "train_size", "held_out_size")
        self.require("vocab_size", 4 <= self.vocab_size <= 32_767, "from 4 (two to copy, a blank and a mark) to 32767")
        least = 2 * self.num_tokens + 1
        self.require("length", self.length >= least, f"at least {least}: {self.num_tokens} tokens, twice, and a mark")
        self.require_seed()


@dataclass(frozen=True, kw_only=True)
class MadSelectiveCopyOptions(SelectiveCopyOptions):
    """As the other ones, with the numbers of MAD's baseline."""

    length: int = 256
    train_size: int = 12_800
    held_out_size: int = 1_280


class SelectiveCopyTask(TableTask):
    """A causal model labels every place; only the last ``num_tokens`` are scored, each with one of V - 2 tokens."""

    def __init__(self, name: str, options: SelectiveCopyOptions) -> None:
        train, held_out = apart(partial(_examples, name, options), options.train_size, options.held_out_size)
        tokens, copied = held_out["input_ids"].numpy(), held_out["labels"].numpy()[:, -options.num_tokens :]
        super().__init__(
            name=name,
            train=train,
            held_out=held_out,
            description=f"Selective copying in {'MAD' if name.startswith('mad') else 'Mamba'}'s manner: {options.num_tokens} of {options.length:,} "
            f"tokens, {options.vocab_size} kinds, {options.train_size:,} sequences for training, {options.held_out_size:,} held out.",
            tokens_per_example=options.length,
            chance=commonest_shown(tokens, copied, options.vocab_size - 2),
            model_fields={
                "architecture": "token_classification",
                "vocab_size": options.vocab_size,
                "num_labels": options.vocab_size,
                "causal": True,
            },
        )


def _examples(name: str, options: SelectiveCopyOptions, part: str, size: int) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``labels``, int16 [size, length]."""
    draws = generator(options.data_seed, part)
    blank, mark, count = options.vocab_size - 2, options.vocab_size - 1, options.num_tokens
    copied = draws.randint(0, blank, size=(size, count))
    tokens = np.full((size, options.length), blank, dtype=np.int16)
    if name.startswith("mad"):
        # Each blank goes before a token of its own choice: so the last token stands right before the mark.
        before = draws.randint(0, count, size=(size, options.length - 2 * count - 1))
        gaps = np.stack([(before == token).sum(axis=1) for token in range(count)], axis=1)
        places = gaps.cumsum(axis=1) + np.arange(count)
        tokens[:, -count - 1] = mark
    else:
        places = np.sort(distinct(draws, size, count, options.length - count), axis=1)
        tokens[:, -count:] = mark
    np.put_along_axis(tokens, places, copied.astype(np.int16), axis=1)
    labels = np.full((size, options.length), IGNORED, dtype=np.int16)
    labels[:, -count:] = copied
    return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}


KINDS = (
    TaskKind(
        name="selective-copy",
        summary="tokens that stand among blanks, again and in their order (Mamba's setting)",
        options=SelectiveCopyOptions,
        load=partial(SelectiveCopyTask, "selective-copy"),
    ),
    TaskKind(
        name="mad-selective-copying",
        summary="tokens that stand among blanks, again and in their order (MAD's setting)",
        options=MadSelectiveCopyOptions,
        load=partial(SelectiveCopyTask, "mad-selective-copying"),
    ),
)
