"""Automata learnt from the context, against automata walked by hand and languages written out."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from task_fixture import SMALL, load
from task_solvers import scores
from twofold.errors import TwofoldError
from twofold.tasks import IGNORED, TASKS
from twofold.tasks.automata import canonical, random_automaton
from twofold.tasks.task import generator

SYMBOLS = SMALL["automata"]["num_symbols"]
SEPARATOR, PADDING = SYMBOLS, SYMBOLS + 1


def accepts(edges, string) -> bool:
    state = 0
    for symbol in string:
        if symbol not in edges[state]:
            return False
        state = edges[state][symbol]
    return True


def language(edges, longest: int) -> frozenset:
    """All strings up to that length; automata of n and m states that differ do so on a string of n + m - 1 symbols at most."""
    strings = [()]
    for string in strings:
        if len(string) < longest:
            strings += [(*string, symbol) for symbol in range(SYMBOLS) if accepts(edges, (*string, symbol))]
    return frozenset(strings)


def sequences(task):
    """Each row of tokens and of labels with its automaton."""
    batches = [task.train_batch(torch.arange(task.train_size)), *task.held_out_batches(7)]
    rows = [row for batch in batches for row in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)]
    return zip(rows, task.automata, strict=True)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_string_is_of_its_automaton_and_padding_is_never_scored(seed):
    task = load("automata", data_seed=seed)
    for (row, labels), edges in sequences(task):
        text = [token for token in row if token != PADDING]
        assert row == text + [PADDING] * (len(row) - len(text))
        strings = "".join(chr(97 + token) if token < SYMBOLS else "|" for token in text).split("|")
        assert 2 <= len(strings) <= 4
        for string in strings:
            assert 1 <= len(string) <= 6
            assert accepts(edges, [ord(letter) - 97 for letter in string])
        assert labels == [token if token < SYMBOLS else IGNORED for token in row]
    for edges in task.automata:
        assert 3 <= len(edges) <= 4
        for state, leads in enumerate(edges):
            assert 1 <= len(leads) <= 2
            assert len(set(leads.values())) == len(leads)
            assert state not in leads.values()


@settings(max_examples=10)
@given(seed=st.integers(0, 999))
def test_no_language_comes_twice(seed):
    task = load("automata", data_seed=seed)
    languages = [language(edges, 7) for edges in task.automata]
    assert len(set(languages)) == len(languages) == 51


@settings(max_examples=40)
@given(seeds=st.tuples(st.integers(0, 300), st.integers(0, 300)), symbols=st.integers(2, 3))
def test_canonical_forms_are_equal_exactly_where_languages_are(seeds, symbols):
    options = SimpleNamespace(min_states=2, max_states=3, max_edges=1, num_symbols=symbols)
    one, other = (random_automaton(generator(seed, "test"), options) for seed in seeds)
    assert (canonical(one) == canonical(other)) == (language(one, 5) == language(other, 5))


def test_a_ring_of_equal_states_is_a_ring_of_one():
    assert canonical([{0: 1}, {0: 2}, {0: 0}]) == canonical([{0: 1}, {0: 0}]) == (((0, 0),),)
    assert canonical([{0: 1}, {1: 0}]) != canonical([{1: 1}, {0: 0}])


def answering(task, choose):
    """The logits of somebody who knows the automaton; ``choose`` gives the likely symbols of a state."""
    automata = {tuple(row): edges for (row, _), edges in sequences(task)}

    def logits_of(batch):
        logits = torch.full((*batch["input_ids"].shape, SYMBOLS + 2), -200.0, dtype=torch.float64)
        for index, row in enumerate(batch["input_ids"].tolist()):
            edges, state = automata[tuple(row)], 0
            for place, token in enumerate(row):
                state = edges[state][token] if token < SYMBOLS else 0
                logits[index, place, list(choose(edges[state]))] = 0.0
        return logits

    return logits_of


def test_the_score_counts_allowed_symbols_and_the_distance_of_distributions():
    task = load("automata", held_out_size=60)
    perfect = scores(task, answering(task, lambda leads: leads))
    assert perfect["accuracy"] == 1.0
    assert perfect["total_variation"] == pytest.approx(0.0, abs=1e-12)
    assert 0.3 < perfect["exact"] < 1.0
    single = scores(task, answering(task, lambda leads: [min(leads)]))
    edges = [leads for automaton in task.automata for leads in automaton]
    assert single["accuracy"] == 1.0
    assert 0.05 < single["total_variation"] < 0.5  # 1/2 where there are two symbols, 0 where there is one
    assert any(len(leads) == 1 for leads in edges)
    wrong = scores(task, answering(task, lambda leads: set(range(SYMBOLS)) - set(leads)))
    assert wrong["accuracy"] == 0.0
    assert wrong["total_variation"] == pytest.approx(1.0)


def test_a_guesser_is_right_as_often_as_symbols_are_allowed():
    task = load("automata", held_out_size=200)
    batch = next(task.held_out_batches(200))
    allowed = task.allowed(batch)[:, 1:]
    chance = allowed.sum() / (allowed.any(-1).sum() * SYMBOLS)
    draws = torch.Generator().manual_seed(0)

    def guess(batch):
        logits = torch.full((*batch["labels"].shape, SYMBOLS + 2), -50.0)
        logits[..., :SYMBOLS] = torch.rand((*batch["labels"].shape, SYMBOLS), generator=draws)
        return logits

    assert scores(task, guess)["accuracy"] == pytest.approx(chance, abs=5 * (chance / allowed.any(-1).sum()) ** 0.5)


def test_the_defaults_are_what_regbench_draws():
    options = TASKS["automata"].options()
    assert (options.num_symbols, options.max_states, options.train_size, options.held_out_size) == (18, 12, 5_000, 500)
    assert options.length == 949


def test_a_language_longer_than_the_bound_is_cut():
    assert language([{0: 1}, {1: 0}], 3) == {(), (0,), (0, 1), (0, 1, 0)}
    assert {len(string) for string in language([{0: 1, 1: 1}, {0: 0, 1: 0}], 3)} == {0, 1, 2, 3}
    assert len(list(product(range(2), repeat=3))) == sum(len(s) == 3 for s in language([{0: 1, 1: 1}, {0: 0, 1: 0}], 3))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"min_states": 2}, "min_states is 2, but it must be at least 3: edges lead to different other states"),
        ({"max_states": 2}, "max_states is 2, but it must be from min_states = 3 to 100"),
        ({"num_symbols": 2}, "num_symbols is 2, but it must be from 3 to 120, more than edges"),
        ({"max_strings": 1}, "max_strings is 1, but it must be at least min_strings = 2"),
        ({"min_strings": 1, "max_strings": 1, "max_length": 1}, "max_length is 1, but it must be at least 2"),
        ({"max_edges": 1, "max_states": 3, "min_states": 2, "num_symbols": 2}, "automata no new ones are found: allow more states"),
    ],
)  # fmt: skip
def test_a_mistake_gets_its_sentence(options, sentence):
    with pytest.raises(TwofoldError) as caught:
        load("automata", **options)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
