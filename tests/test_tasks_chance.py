"""Chance levels: what a guesser who looks nothing up really gets, task by task, and that the page says these numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from task_fixture import SMALL, load
from task_solvers import scores, shift, width
from twofold.task_spec import TaskSpec
from twofold.tasks import IGNORED, Task, load_task
from twofold.tasks.task import commonest_so_far

PAGE = Path(__file__).parent.parent / "docs" / "tasks.md"
Guesser = Callable[[list[int], int, np.random.Generator], int]
"""A row of tokens, the place before which an answer is due, and a source of chance -> the guess."""


def guessing(task: Task, guess: Guesser) -> Callable[[dict[str, Tensor]], Tensor]:
    draws = np.random.default_rng(0)

    def logits_of(batch: dict[str, Tensor]) -> Tensor:
        logits = torch.zeros(*batch["labels"].shape, width(task))
        for index, (row, labels) in enumerate(zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)):
            for place, label in enumerate(labels):
                if label != IGNORED and place >= shift(task):
                    logits[index, place - shift(task), guess(row, place, draws)] = 9.0
        return logits

    return logits_of


def shown_value(row: list[int], place: int, draws: np.random.Generator) -> int:
    """MQAR: one of the values that stand behind keys."""
    pairs = SMALL["mqar"]["num_pairs"]
    return int(draws.choice(row[1 : 2 * pairs : 2]))


def other_name(first: int, named: Callable[[list[int]], list[int]]) -> Guesser:
    """A name of the sequence that is not the one asked about."""

    def guess(row: list[int], place: int, draws: np.random.Generator) -> int:
        names = {token for token in named(row) if token >= first}
        return int(draws.choice(sorted(names - {row[place - 1]})))

    return guess


def commonest(first: int, end: int) -> Guesser:
    """The value that came most often before."""

    def guess(row: list[int], place: int, draws: np.random.Generator) -> int:
        seen = Counter(token for token in row[:place] if first <= token < end)
        return min(range(first, end), key=lambda token: (-seen[token], token))

    return guess


def commonest_of_all(kinds: int, end: int | None = None) -> Guesser:
    """The token that is commonest in what is shown, whatever is asked; ``end`` is where that ends."""

    def guess(row: list[int], place: int, draws: np.random.Generator) -> int:
        seen = Counter(token for token in row[:end] if token < kinds)
        return min(range(kinds), key=lambda token: (-seen[token], token))

    return guess


RELATIONS, HOPS, FUZZY = SMALL["relations"], SMALL["multihop"], SMALL["mad-fuzzy-recall"]["vocab_size"]
GUESSERS: dict[str, Guesser] = {
    "recall": shown_value,
    "mqar": shown_value,
    "mad-recall": commonest(5, 10),
    "mad-noisy-recall": commonest(4, 9),
    "mad-fuzzy-recall": commonest((FUZZY - 1) // 2, FUZZY - 1),
    "mad-selective-copying": commonest_of_all(5),
    "selective-copy": commonest_of_all(5),
    "induction": commonest_of_all(5, -2),
    # S3: the first state is its element, of the others one element says nothing.
    "state-tracking": lambda row, place, draws: row[place] if place == 0 else int(draws.integers(6)),
    "relations": other_name(3 + RELATIONS["vocab_relations"], lambda row: row[: 6 * RELATIONS["num_entities"]]),
    "multihop": other_name(4, lambda row: row[: 2 * HOPS["num_entities"]]),
    "automata": commonest(0, SMALL["automata"]["num_symbols"]),
}


@pytest.mark.parametrize("name", GUESSERS)
def test_chance_is_what_a_guesser_gets_who_looks_nothing_up(name):
    task = load(name, held_out_size=20 if name == "state-tracking" else 400)
    if name == "state-tracking":
        task = load(name, group="S3", length=8, held_out_size=1_000)
    guesses = sum(task.count(batch) for batch in task.held_out_batches(400))
    assert task.chance is not None
    error = (task.chance * (1 - task.chance) / guesses) ** 0.5
    assert scores(task, guessing(task, GUESSERS[name]))["accuracy"] == pytest.approx(task.chance, abs=5 * error)


def test_a_memorized_value_is_guessed_among_those_that_some_key_has():
    task = load("mad-memorization", held_out_size=400)
    values = sorted(set(task.train["labels"].flatten().tolist()) - {IGNORED})
    assert len(values) == 7
    found = scores(task, guessing(task, lambda row, place, draws: int(draws.choice(values))))
    assert task.chance == 1 / 7
    assert found["accuracy"] == pytest.approx(task.chance, abs=5 * (0.15 / 1_200) ** 0.5)


def test_a_compressed_sequence_is_guessed_by_its_commonest_token():
    task, kinds = load("mad-compression", held_out_size=500), SMALL["mad-compression"]["vocab_size"] - 1

    def logits_of(batch):
        found = torch.zeros(*batch["labels"].shape, width(task))
        for index, row in enumerate(batch["input_ids"][:, :-1].tolist()):
            seen = Counter(row)
            guess = min(range(kinds), key=lambda token: (-seen[token], token))
            found[index, -1, guess::kinds] = 9.0
        return found

    assert scores(task, logits_of)["accuracy"] == pytest.approx(task.chance)
    assert task.chance > 1 / kinds + 0.1


def test_the_commonest_value_of_a_set_is_guessed_of_its_cues():
    task = load("capacity", held_out_size=500)
    values = SMALL["capacity"]["num_values"]

    def logits_of(batch):
        known = batch["features"][..., -values - 1 : -1]
        return torch.nn.functional.one_hot(known.sum(dim=1).argmax(-1), values)[:, None].expand(*batch["labels"].shape, -1).float()  # fmt: skip

    assert scores(task, logits_of)["accuracy"] == pytest.approx(task.chance, abs=5 * (0.25 / 1_000) ** 0.5)
    assert task.chance > 1 / values + 0.1


def test_the_commonest_so_far_by_hand():
    tokens = np.array([[7, 8, 8, 7, 8, 3], [8, 8, 7, 7, 7, 7]])
    labels = np.where(np.isin(tokens, (7, 8)), tokens, IGNORED)
    # Row 1 guesses 7 7 7 8 7; row 2 guesses 7 8 8 8 7 7.
    assert commonest_so_far(tokens, labels) == pytest.approx((1 + 0 + 0 + 0 + 0 + 0 + 1 + 0 + 0 + 1 + 1) / 11)
    allowed = np.ones((*tokens.shape, 9), dtype=bool)
    assert commonest_so_far(tokens, labels, allowed) == 1.0


def test_the_page_says_these_levels():
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| 1/(\d+)(?:; (0\.\d+) [^|]*)? \|$", PAGE.read_text(), re.MULTILINE)
    assert {name for name, _, better in rows if better} >= {"mad-recall", "automata", "capacity", "relations"}
    for name, parts, better in rows:
        task = load_task(TaskSpec(name=name, options={"train_size": 50}))
        assert task.chance is not None
        if better:
            assert f"{task.chance:.{len(better) - 2}f}" == better, name
        else:
            assert task.chance == pytest.approx(1 / int(parts)), name
