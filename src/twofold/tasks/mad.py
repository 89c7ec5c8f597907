"""MAD's small tasks: recall in context (plain, noisy, fuzzy), memorization and compression. Selective copying has a file of its own.

    recall     a 3 b 5 a 3 b 5     the value of every key that was seen before is scored
    noisy      a 3 # # b 5 a 3     tokens of a third kind stand in between
    fuzzy      a b 3 c 5 6 a b 3   keys and values are of one to three tokens; when held out, keys are always of three
    memorize   a _ b _             each key's value is the same for ever, and due at the blank
    compress   x y z %             all tokens must be read from the state at the last one

MAD trains the three recalls on every next token and scores values of known keys; option ``train_on_all`` keeps that or turns it off.
Two things differ from the published generator. A short fuzzy sequence is padded behind its end and the padding never scored, and the pair
that is asked for last is always there (the published one leaves it out now and then). Compression has the state at the last token decoded by
one linear map for all places, where MAD has a small MLP with positions: each example therefore asks for one place, and the score is
over all of them.
Source: "Mechanistic Design and Scaling of Hybrid Architectures" (arXiv:2403.17844), its published generators and baseline configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twofold.tasks.options import Options
from twofold.tasks.task import (
    IGNORED,
    Batch,
    Part,
    TableTask,
    TaskKind,
    apart,
    commonest_shown,
    commonest_so_far,
    distinct,
    generator,
)


@dataclass(frozen=True, kw_only=True)
class MadOptions(Options):
    """What all share: tokens, length and sizes; the defaults are MAD's baseline."""

    vocab_size: int = 16
    length: int = 128
    train_size: int = 12_800
    held_out_size: int = 1_280
    data_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "train_size", "held_out_size")
        self.require_at_least(4, "length")
        self.require("vocab_size", 4 <= self.vocab_size <= 32_767, "from 4 to 32767")
        self.require_seed()


@dataclass(frozen=True, kw_only=True)
class MadRecallOptions(MadOptions):
    """The first half of the tokens are keys, the second half values. ``train_on_all``: train on every next token, as MAD does, or on answers alone."""

    train_on_all: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("length", self.length % 2 == 0, "even: a key and a value take two tokens")


@dataclass(frozen=True, kw_only=True)
class MadNoisyOptions(MadRecallOptions):
    """The last ``noise_vocab_size`` tokens are noise, and ``noise`` is the chance of a pair to be two of them."""

    vocab_size: int = 32
    noise_vocab_size: int = 16
    noise: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("noise", 0 <= self.noise < 1, "from 0 up to, not including, 1")
        self.require(
            "noise_vocab_size",
            1 <= self.noise_vocab_size <= self.vocab_size - 4,
            f"from 1 to {self.vocab_size - 4}, to leave two keys and two values of the {self.vocab_size} tokens",
        )


@dataclass(frozen=True, kw_only=True)
class MadFuzzyOptions(MadRecallOptions):
    """Keys have 1 to ``key_tokens`` different tokens, values 1 to ``value_tokens``; the last token of the vocabulary is padding."""

    key_tokens: int = 3
    value_tokens: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "key_tokens", "value_tokens")
        least = 2 * max(self.key_tokens, self.value_tokens) + 1
        self.require(
            "vocab_size",
            self.vocab_size >= least,
            f"at least {least}, for keys and values of that many different tokens and padding",
        )
        least = 3 * (self.key_tokens + self.value_tokens)
        self.require("length", self.length >= least, f"at least {least}, for three of the longest pairs")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MadMemorizationOptions(MadOptions):
    """Of ``vocab_size`` tokens the last is the blank, the others keys and values."""

    vocab_size: int = 256
    length: int = 32
    train_size: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("length", self.length % 2 == 0, "even: a key and a blank take two tokens")


@dataclass(frozen=True, kw_only=True)
class MadCompressionOptions(MadOptions):
    """``train_size`` counts sequences; of each there are ``length`` - 1 examples, one for every place that is asked for."""

    length: int = 32


# Recall


def _recall(options: MadRecallOptions, part: str, size: int) -> dict[str, np.ndarray]:
    """Tokens [size, length], and where a value is due."""
    draws = generator(options.data_seed, part)
    noise_vocab_size = options.noise_vocab_size if isinstance(options, MadNoisyOptions) else 0
    noise = options.noise if isinstance(options, MadNoisyOptions) else 0.0
    pairs, meaningful = options.length // 2, options.vocab_size - noise_vocab_size
    num_keys, rows = meaningful // 2, np.arange(size)
    value_of = draws.randint(num_keys, meaningful, size=(size, num_keys))
    keys = draws.randint(0, num_keys, size=(size, pairs))
    is_noise = draws.random_sample((size, pairs)) < noise
    is_noise[rows, draws.randint(0, pairs - 1, size=size)] = False  # one pair at least, before the last
    is_noise[:, -1] = False

    seen, due = np.zeros((size, num_keys), dtype=bool), np.zeros((size, options.length), dtype=bool)
    last = draws.random_sample((size, num_keys))
    for pair in range(pairs):
        if pair == pairs - 1:
            keys[:, pair] = np.where(seen, last, -1).argmax(axis=1)  # any of those that were seen
        due[:, 2 * pair + 1] = seen[rows, keys[:, pair]] & ~is_noise[:, pair]
        seen[rows, keys[:, pair]] |= ~is_noise[:, pair]
    tokens = np.empty((size, options.length), dtype=np.int64)
    tokens[:, 0::2], tokens[:, 1::2] = keys, np.take_along_axis(value_of, keys, axis=1)
    hidden = np.repeat(is_noise, 2, axis=1)
    noisy = draws.randint(meaningful, options.vocab_size, size=tokens.shape) if noise_vocab_size else tokens
    return {"tokens": np.where(hidden, noisy, tokens), "due": due, "text": np.ones_like(due)}


def _fuzzy(options: MadFuzzyOptions, part: str, size: int) -> dict[str, np.ndarray]:
    """The same of longer keys and values, with ``text`` False where there is padding."""
    draws = generator(options.data_seed, part)
    num_keys = (options.vocab_size - 1) // 2
    num_values = options.vocab_size - 1 - num_keys
    most = options.length // 2  # pairs in a sequence, at the very most
    motifs = (
        distinct(draws, size * most, options.key_tokens, num_keys).reshape(size, most, -1),
        num_keys + distinct(draws, size * most, options.value_tokens, num_values).reshape(size, most, -1),
    )
    shortest = 1 if part.startswith("train") else options.key_tokens
    key_sizes = draws.randint(shortest, options.key_tokens + 1, size=(size, most))
    value_sizes = draws.randint(1, options.value_tokens + 1, size=(size, most))
    share = draws.random_sample(size)
    tokens = np.full((size, options.length), options.vocab_size - 1)
    due, text = np.zeros(tokens.shape, dtype=bool), np.zeros(tokens.shape, dtype=bool)
    for row in range(size):
        pairs = [
            (tuple(key[:key_size]), tuple(value[:value_size]))
            for key, key_size, value, value_size in zip(
                motifs[0][row].tolist(), key_sizes[row], motifs[1][row].tolist(), value_sizes[row], strict=True
            )
        ]
        sequence, scored = _fuzzy_sequence(pairs, options, float(share[row]))
        tokens[row, : len(sequence)], due[row, scored], text[row, : len(sequence)] = sequence, True, True
    return {"tokens": tokens, "due": due, "text": text}


Pair = tuple[tuple[int, ...], tuple[int, ...]]


def _fuzzy_sequence(pairs: list[Pair], options: MadFuzzyOptions, share: float) -> tuple[list[int], list[int]]:
    """A sequence of the pairs, and the places where a value is due. The first pair is the one asked for at the end, and stands ``share`` of the way in."""
    asked, *others = pairs
    asked_size = len(asked[0]) + len(asked[1])
    room = options.length - asked_size - options.key_tokens - options.value_tokens
    known, sequence, due = dict([asked]), list[int](), list[int]()
    shown = set[tuple[int, ...]]()

    def say(key: tuple[int, ...]) -> None:
        value = known[key]
        sequence.extend(key)
        if key in shown:
            due.extend(range(len(sequence), len(sequence) + len(value)))
        sequence.extend(value)
        shown.add(key)

    for key, value in others:
        if len(sequence) >= room:
            break
        ends = len(sequence) + len(key) + len(known.setdefault(key, value)) >= room
        say(asked[0] if asked[0] not in shown and (len(sequence) >= share * room or ends) else key)
    say(asked[0])
    return sequence, due


def _recall_task(
    name: str, draw: Callable[[Any, str, int], dict[str, np.ndarray]], what: str
) -> Callable[[MadRecallOptions], TableTask]:
    def load(options: MadRecallOptions) -> TableTask:
        def part(part_name: str, size: int) -> dict[str, Tensor]:
            drawn = draw(options, part_name, size)
            scored = drawn["text"] if part_name.startswith("train") and options.train_on_all else drawn["due"]
            return _table(drawn["tokens"], np.where(scored, drawn["tokens"], IGNORED))

        train, held_out = apart(part, options.train_size, options.held_out_size)
        return TableTask(
            name=name,
            train=train,
            held_out=held_out,
            chance=commonest_so_far(held_out["input_ids"].numpy(), held_out["labels"].numpy()),
            description=f"MAD's {what}: {options.length} of {options.vocab_size} tokens, {options.train_size:,} sequences for training, "
            f"{options.held_out_size:,} held out.",
            tokens_per_example=options.length,
            model_fields={"architecture": "causal_lm", "vocab_size": options.vocab_size, "causal": True},
        )

    return load


def _table(tokens: np.ndarray, labels: np.ndarray) -> dict[str, Tensor]:
    return {name: torch.from_numpy(a.astype(np.int16)) for name, a in (("input_ids", tokens), ("labels", labels))}


# Memorization


def _memorization(options: MadMemorizationOptions) -> TableTask:
    num_keys = (options.vocab_size - 1) // 2
    values = num_keys + generator(options.data_seed, "map").permutation(options.vocab_size - 1 - num_keys)

    def part(part_name: str, size: int) -> dict[str, Tensor]:
        keys = generator(options.data_seed, part_name).randint(0, num_keys, size=(size, options.length // 2))
        tokens = np.full((size, options.length), options.vocab_size - 1)
        labels = np.full(tokens.shape, IGNORED)
        tokens[:, 0::2], labels[:, 1::2] = keys, values[keys]
        return _table(tokens, labels)

    train, held_out = apart(part, options.train_size, options.held_out_size)
    return TableTask(
        name="mad-memorization",
        train=train,
        held_out=held_out,
        description=f"MAD's memorization: the fixed values of {num_keys:,} keys, {options.train_size:,} sequences of {options.length // 2} keys for "
        f"training, {options.held_out_size:,} held out.",
        tokens_per_example=options.length,
        chance=1 / num_keys,  # values differ, and one that no key has is no answer
        model_fields={
            "architecture": "token_classification",
            "vocab_size": options.vocab_size,
            "num_labels": options.vocab_size,
            "causal": True,
        },
    )


# Compression


class CompressionTask(TableTask):
    """The label at the last token is p · (V - 1) + x for one place p and the token x there; the score is over all places."""

    def __init__(self, options: MadCompressionOptions) -> None:
        self._kinds, self._places = options.vocab_size - 1, options.length - 1

        def draw(part_name: str, size: int) -> dict[str, Tensor]:
            draws = generator(options.data_seed, part_name)
            return {"input_ids": torch.from_numpy(draws.randint(0, self._kinds, size=(size, self._places)))}

        def part(drawn: Part, asked: int) -> dict[str, Tensor]:
            """``asked`` examples of every sequence, for as many places in turn."""
            sequences = drawn["input_ids"].numpy().repeat(asked, axis=0)
            rows = np.arange(len(sequences))
            tokens = np.pad(sequences, ((0, 0), (0, 1)), constant_values=self._kinds)
            labels = np.full(tokens.shape, IGNORED)
            labels[:, -1] = rows % self._places * self._kinds + sequences[rows, rows % self._places]
            return {"input_ids": _table(tokens, tokens)["input_ids"], "labels": torch.from_numpy(labels.astype(np.int32))}  # fmt: skip

        train, held_out = apart(draw, options.train_size, options.held_out_size)
        sequences = held_out["input_ids"].numpy()
        super().__init__(
            name="mad-compression",
            train=part(train, self._places),
            held_out=part(held_out, 1),
            description=f"MAD's compression: {self._places} tokens read from the state of the one behind them, {options.train_size:,} sequences for "
            f"training, {options.held_out_size:,} held out.",
            tokens_per_example=options.length,
            chance=commonest_shown(sequences, sequences, self._kinds),
            model_fields={
                "architecture": "token_classification",
                "vocab_size": options.vocab_size,
                "num_labels": self._places * self._kinds,
                "causal": True,
            },
        )

    def measure(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """As every task, and how many tokens of the sequences there are, and how many are the likeliest of their place."""
        tokens = batch["input_ids"][:, :-1].to(logits.device)
        read = logits[:, -1].unflatten(-1, (self._places, self._kinds)).argmax(-1)
        places = torch.tensor(float(tokens.numel()), dtype=torch.float64, device=logits.device)
        return super().measure(logits, batch) | {"read": (read == tokens).double().sum(), "places": places}

    def scores(self, totals: Mapping[str, float]) -> dict[str, float]:
        """``loss`` per example, ``accuracy`` per token of the sequences."""
        return {"loss": totals["loss"] / totals["count"], "accuracy": totals["read"] / totals["places"]}


_RECALLS: tuple[tuple[str, type[MadRecallOptions], Callable[[Any, str, int], dict[str, np.ndarray]], str], ...] = (
    ("mad-recall", MadRecallOptions, _recall, "recall in context"),
    ("mad-noisy-recall", MadNoisyOptions, _recall, "noisy recall in context"),
    ("mad-fuzzy-recall", MadFuzzyOptions, _fuzzy, "fuzzy recall in context"),
)

KINDS = (
    *(
        TaskKind(name=name, summary=f"the value of a key that was seen before (MAD's {what})", options=options, load=_recall_task(name, draw, what))
        for name, options, draw, what in _RECALLS
    ),
    TaskKind(
        name="mad-memorization",
        summary="the value of a key, the same in all sequences (MAD's memorization)",
        options=MadMemorizationOptions,
        load=_memorization,
    ),
    TaskKind(
        name="mad-compression",
        summary="all tokens of a sequence, from the state at its last one (MAD's compression)",
        options=MadCompressionOptions,
        load=CompressionTask,
    ),
)  # fmt: skip
