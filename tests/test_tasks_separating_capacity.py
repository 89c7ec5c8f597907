"""Associative capacity: cues against the pattern that they are nearest to, and the memory against attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from task_fixture import SMALL, load
from task_solvers import scores
from twofold.errors import TwofoldError
from twofold.kernels import Inputs, Mask, attend
from twofold.tasks import IGNORED
from twofold.tasks.capacity import TOLERANCE, hopfield_capacity, hopfield_retrieval

DIMENSION, COUNT, VALUES = (SMALL["capacity"][name] for name in ("dimension", "num_patterns", "num_values"))


def nearest(features: torch.Tensor) -> list[int]:
    """The value of the stored pattern from which each cue differs least, sign by sign."""
    rows = features.tolist()
    stored = [row for row in rows if not row[-1]]
    answers = []
    for cue in rows[len(stored) :]:
        differences = [sum(a != b for a, b in zip(cue[:DIMENSION], row[:DIMENSION], strict=True)) for row in stored]
        best = stored[differences.index(min(differences))]
        answers.append(best[DIMENSION:-1].index(1.0))
    return answers


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_cues_label_is_the_value_of_the_nearest_pattern_and_nothing_else_is_scored(seed):
    task = load("capacity", data_seed=seed)
    for batch in (task.train_batch(torch.arange(40)), *task.held_out_batches(11)):
        assert task.count(batch) == 2 * len(batch["labels"])
        for features, labels in zip(batch["features"], batch["labels"].tolist(), strict=True):
            assert labels[:COUNT] == [IGNORED] * COUNT
            assert labels[COUNT:] == nearest(features)
            signs, known = features[:, :DIMENSION], features[:, DIMENSION:]
            assert (signs.abs() == 1).all()
            assert (known.sum(dim=1) == 1).all()
            assert (known[:, -1] == (torch.arange(COUNT + 2) >= COUNT)).all()
            differences = (signs[COUNT:, None] != signs[None, :COUNT]).sum(-1)
            assert (differences.min(dim=1).values == 1).all()  # 0.1 of 12 signs
            assert ((differences == 1).sum(dim=1) == 1).all()


def test_the_memory_without_weights_solves_the_task_and_a_guesser_is_at_chance():
    task = load("capacity", held_out_size=300)

    def remembering(batch):
        logits = torch.zeros(*batch["labels"].shape, VALUES)
        for index, features in enumerate(batch["features"].numpy()):
            cues = np.concatenate([features[COUNT:, :DIMENSION], np.zeros((2, VALUES + 1))], axis=1)
            found = hopfield_retrieval(features[:COUNT], cues, beta=2.0)
            logits[index, COUNT:] = torch.from_numpy(found[:, DIMENSION:-1])
        return logits

    draws = torch.Generator().manual_seed(0)
    assert scores(task, remembering)["accuracy"] == 1.0
    guesses = scores(task, lambda batch: torch.rand((*batch["labels"].shape, VALUES), generator=draws))
    assert guesses["accuracy"] == pytest.approx(1 / VALUES, abs=5 * (1 / VALUES / 600) ** 0.5)


@pytest.mark.parametrize("steps", [1, 3])
def test_retrieval_is_attention_whose_values_are_its_keys(steps):
    draws = np.random.default_rng(0)
    patterns, states = draws.normal(size=(7, 5)), draws.normal(size=(3, 5))
    key, query = (torch.from_numpy(rows)[None, None] for rows in (patterns, states))
    for _ in range(steps):
        query = attend(Inputs(query=query, key=key, value=key, mask=Mask(causal=False), scale=0.7), "reference")
    np.testing.assert_allclose(
        hopfield_retrieval(patterns, states, beta=0.7, steps=steps), query[0, 0].numpy(), rtol=1e-12
    )


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), beta=st.floats(0.0, 30.0), steps=st.integers(1, 4))
def test_what_is_retrieved_lies_between_the_patterns_and_a_strong_pull_ends_at_one(seed, beta, steps):
    draws = np.random.default_rng(seed)
    patterns, states = 2.0 * draws.integers(0, 2, size=(5, 6)) - 1, draws.normal(size=(4, 6))
    found = hopfield_retrieval(patterns, states, beta=beta, steps=steps)
    assert (found <= patterns.max(axis=0) + 1e-12).all()
    assert (found >= patterns.min(axis=0) - 1e-12).all()
    ended = hopfield_retrieval(patterns, states, beta=1e6)
    np.testing.assert_allclose(ended, patterns[(states @ patterns.T).argmax(axis=1)], atol=1e-6)


def test_capacity_is_what_counting_by_hand_gives():
    """Two antipodes of four signs at β = 1/2 come back as tanh(β · 4), within the tolerance; what is pulled nowhere is lost."""
    strong, weak = 10.0, 0.0
    assert hopfield_capacity(4, beta=strong, noise=0.0, most=8) == 8
    assert hopfield_capacity(4, beta=weak, noise=0.0, most=8) == 0
    lone = hopfield_retrieval(np.array([[1.0] * 4, [-1.0] * 4]), np.array([[1.0] * 4]), beta=0.5)
    np.testing.assert_allclose(lone, np.tanh(0.5 * 4), rtol=1e-12)
    assert abs(lone - 1).max() < TOLERANCE


def test_capacity_grows_with_the_dimension_and_with_steps():
    one = [hopfield_capacity(dimension, most=512) for dimension in (16, 24, 32)]
    more = [hopfield_capacity(dimension, steps=5, most=512) for dimension in (16, 24, 32)]
    assert one == sorted(one)
    assert more[0] < more[1]
    assert all(iterated >= single for single, iterated in zip(one, more, strict=True))
    assert more[1] > one[1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_cues": 5}, "num_cues is 5, but it must be at most 4: each is of another pattern"),
        ({"noise": 0.5}, "noise is 0.5, but it must be from 0 up to, not including, 0.5"),
        ({"num_values": 1}, "num_values is 1, but it must be from 2 to 255"),
        ({"dimension": 3, "num_patterns": 9}, "9 patterns of 3 signs are not found so far apart that 0 turned signs leave"),
    ],
)  # fmt: skip
def test_a_mistake_gets_its_sentence(options, sentence):
    with pytest.raises(TwofoldError) as caught:
        load("capacity", **options)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
