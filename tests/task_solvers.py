"""Readers who solve a task slowly, from the tokens that they have read so far and nothing else, and the range in which a guesser guesses.

A solver takes a row of tokens and gives, for each place, the answer due there (as the next token where the model is a language model).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from task_fixture import load, totals_of
from twofold.tasks import IGNORED, Task

Answers = dict[int, int]
Solver = Callable[[list[int]], Answers]


def shift(task: Task) -> int:
    """How far behind its prediction a label stands."""
    return 1 if task.model_fields["architecture"] == "causal_lm" else 0


def due(task: Task, labels: list[int]) -> Answers:
    """Place of the prediction -> label."""
    return {
        place - shift(task): label for place, label in enumerate(labels) if label != IGNORED and place >= shift(task)
    }


def width(task: Task) -> int:
    return task.model_fields.get("num_labels") or task.model_fields["vocab_size"]


def solved(task: Task, solver: Solver, late: int = 0) -> Callable[[dict[str, Tensor]], Tensor]:
    """The logits of somebody who answers as the solver does, ``late`` places late."""

    def logits_of(batch: dict[str, Tensor]) -> Tensor:
        logits = torch.zeros(*batch["labels"].shape, width(task))
        for index, row in enumerate(batch["input_ids"].tolist()):
            for place, answer in solver(row).items():
                if place + late < len(row):
                    logits[index, place + late, answer] = 50.0
        return logits

    return logits_of


def guessed(task: Task, answers: range) -> Callable[[dict[str, Tensor]], Tensor]:
    """The logits of somebody who guesses among possible answers."""
    draws = torch.Generator().manual_seed(0)

    def logits_of(batch: dict[str, Tensor]) -> Tensor:
        logits = torch.full((*batch["labels"].shape, width(task)), -50.0)
        logits[..., answers.start : answers.stop] = torch.rand((*batch["labels"].shape, len(answers)), generator=draws)
        return logits

    return logits_of


def scores(task: Task, logits_of: Callable[[dict[str, Tensor]], Tensor]) -> dict[str, float]:
    """Of the held-out part."""
    return task.scores(totals_of(task, task.held_out_batches(16), logits_of))


def check_labels(task: Task, solver: Solver, *, train: bool = True) -> None:
    """Every label is the solver's answer, and every answer of the solver is a label; and none needs a token that comes later."""
    parts: list[Iterator[dict[str, Tensor]]] = [task.held_out_batches(16)]
    if train:
        parts.append(iter([task.train_batch(torch.arange(task.train_size))]))
    for batches in parts:
        for batch in batches:
            for row, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
                wanted = due(task, labels)
                assert wanted
                assert {
                    place: answer for place, answer in solver(row).items() if place < len(row) - shift(task)
                } == wanted
            for place, answer in wanted.items():  # of the last row
                assert solver(row[: place + 1])[place] == answer


# Solvers, by name of task and its options


def known_pairs(row: list[int], keys: int, meaningful: int) -> Answers:
    """MAD's recall: at a key that was paired before, its value."""
    known, answers = {}, {}
    for place in range(0, len(row), 2):
        if row[place] < keys:
            if row[place] in known:
                answers[place] = known[row[place]]
            if place + 1 < len(row):
                assert keys <= row[place + 1] < meaningful
                known[row[place]] = row[place + 1]
    return answers


def known_motifs(row: list[int], keys: int, padding: int) -> Answers:
    """MAD's fuzzy recall: each run of keys and the run of values behind it, cut where the kind changes."""
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    answers: Answers = {}
    key: list[int] = []
    value: list[int] = []
    for place, token in enumerate(row):
        if value and token < keys:
            known.setdefault(tuple(key), tuple(value))
            key, value = [], []
        if token == padding:
            break
        (key if token < keys else value).append(token)
        following = row[place + 1] if place + 1 < len(row) else None
        asked = known.get(tuple(key))
        if asked and len(value) < len(asked) and (value or following is None or following >= keys):
            answers[place] = asked[len(value)]
    return answers


def copied(row: list[int], blank: int) -> Answers:
    """Selective copying: the tokens that were no blanks, from the mark on; MAD's mark is one place earlier than its answers."""
    mark = row.index(blank + 1) if blank + 1 in row else len(row)
    first = mark + 1 if mark + 1 < len(row) and row[mark + 1] == blank else mark
    said = [token for token in row[:mark] if token != blank]
    return {first + number: token for number, token in enumerate(said) if first + number < len(row)}


def followed(row: list[int], trigger: int, length: int) -> Answers:
    """Induction: at the last place but one, what followed the last trigger before."""
    if len(row) < length - 1:
        return {}
    assert row[length - 2] == trigger
    before = max(place for place in range(length - 2) if row[place] == trigger)
    return {length - 2: row[before + 1]}


def elements(group: str) -> list[tuple[int, ...]]:
    """Permutations in lexical order; even are those whose number of cycles leaves the same remainder as their length."""

    def is_even(p: tuple[int, ...]) -> bool:
        left, cycles = set(range(len(p))), 0
        while left:
            cycles += 1
            place = min(left)
            while place in left:
                left.remove(place)
                place = p[place]
        return (len(p) - cycles) % 2 == 0

    return [p for p in itertools.permutations(range(int(group[1:]))) if group[0] == "S" or is_even(p)]


def tracked(row: list[int], group: str) -> Answers:
    """State tracking: cards on a table, exchanged by one element after another; or a sum on a clock."""
    if group[0] == "Z":
        return {place: sum(row[: place + 1]) % int(group[1:]) for place in range(len(row))}
    found = elements(group)
    cards, answers = list(found[0]), {}
    for place, token in enumerate(row):
        cards = [cards[slot] for slot in found[token]]
        answers[place] = found.index(tuple(cards))
    return answers


def related(row: list[int], first_entity: int, lost: Callable[[int], bool] = lambda place: False) -> Answers:
    """Relations: who was said to beat whom; where ``lost`` says so, with the direction of the question confused."""
    facts, answers, place = [], {}, 0
    while place + 2 < len(row):
        first, second, third = row[place : place + 3]
        if first >= first_entity:
            facts.append((first, second, third))
            place += 3
        else:
            is_whom = (second == 1) != lost(place)
            for winner, relation, loser in facts:
                if relation == first and (winner if is_whom else loser) == third:
                    answers[place + 2] = loser if is_whom else winner
            place += 4
    return answers


def walked(row: list[int], max_hops: int) -> Answers:
    """Multi-hop look-up: step by step along the facts."""
    steps, answers, place = {}, {}, 0
    while place + 1 < len(row):
        if row[place] > max_hops:
            steps[row[place]] = row[place + 1]
            place += 2
        else:
            name = row[place + 1]
            for _ in range(row[place]):
                name = steps[name]
            answers[place + 1] = name
            place += 3
    return answers


SOLVERS: dict[str, Callable[[dict[str, Any]], Solver]] = {
    "mad-recall": lambda o: lambda row: known_pairs(row, o["vocab_size"] // 2, o["vocab_size"]),
    "mad-noisy-recall": lambda o: (
        lambda row: known_pairs(
            row, (o["vocab_size"] - o["noise_vocab_size"]) // 2, o["vocab_size"] - o["noise_vocab_size"]
        )
    ),
    "mad-fuzzy-recall": lambda o: lambda row: known_motifs(row, (o["vocab_size"] - 1) // 2, o["vocab_size"] - 1),
    "mad-selective-copying": lambda o: lambda row: copied(row, o["vocab_size"] - 2),
    "selective-copy": lambda o: lambda row: copied(row, o["vocab_size"] - 2),
    "induction": lambda o: lambda row: followed(row, o["vocab_size"] - 1, o["length"]),
    "state-tracking": lambda o: lambda row: tracked(row, o["group"]),
    "relations": lambda o: lambda row: related(row, 3 + o["vocab_relations"]),
    "multihop": lambda o: lambda row: walked(row, o.get("max_hops", 3)),
}
"""Task -> its options -> solver. Memorization is solved by no reader: its values stand in no sequence."""

ANSWERS: dict[str, Callable[[dict[str, Any]], range]] = {
    "mad-recall": lambda o: range(o["vocab_size"] // 2, o["vocab_size"]),
    "mad-noisy-recall": lambda o: range(
        (o["vocab_size"] - o["noise_vocab_size"]) // 2, o["vocab_size"] - o["noise_vocab_size"]
    ),
    "mad-fuzzy-recall": lambda o: range((o["vocab_size"] - 1) // 2, o["vocab_size"] - 1),
    "mad-selective-copying": lambda o: range(o["vocab_size"] - 2),
    "selective-copy": lambda o: range(o["vocab_size"] - 2),
    "induction": lambda o: range(o["vocab_size"] - 1),
    "state-tracking": lambda o: range(len(elements(o["group"]))),
    "relations": lambda o: range(3 + o["vocab_relations"], 3 + o["vocab_relations"] + o["vocab_entities"]),
    "multihop": lambda o: range(1 + o.get("max_hops", 3), 1 + o.get("max_hops", 3) + o["vocab_entities"]),
}
"""Task -> its options -> what may be an answer."""


def solver_of(name: str, options: dict[str, Any]) -> Solver:
    return SOLVERS[name](options)


__all__ = ["ANSWERS", "SOLVERS", "check_labels", "due", "guessed", "load", "scores", "shift", "solved", "solver_of"]
