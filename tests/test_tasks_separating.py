"""Tasks that separate architectures: each against a slow reader who solves it from the tokens alone, and a small model that learns it."""

from __future__ import annotations

import doctest
import math
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from task_fixture import SMALL, load
from task_solvers import ANSWERS, SOLVERS, check_labels, elements, guessed, related, scores, solved, tracked, walked
from twofold.errors import TwofoldError
from twofold.spec import ModelSpec
from twofold.task_spec import TaskSpec
from twofold.tasks import (
    IGNORED,
    TASKS,
    automata,
    capacity,
    induction,
    load_task,
    mad,
    multihop,
    recall,
    relations,
    selective_copy,
    state_tracking,
)
from twofold.tasks.facts import rings
from twofold.tasks.state_tracking import multiplication
from twofold.tasks.task import generator
from twofold.training.spec import RunSpec, TrainingSpec
from twofold.training.trainer import train

PAGE = Path(__file__).parent.parent / "docs" / "tasks.md"
SEPARATING = (recall, mad, selective_copy, induction, state_tracking, relations, multihop, automata, capacity)
TRAINED_ON_ALL = ("mad-recall", "mad-noisy-recall", "mad-fuzzy-recall")
PUBLISHED = [(64, 4), (128, 8), (256, 16), (512, 64)]


@pytest.mark.parametrize("name", SOLVERS)
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_label_is_what_a_reader_answers(name, seed):
    changes = {"train_on_all": False} if name in TRAINED_ON_ALL else {}
    options = SMALL[name] | changes
    check_labels(load(name, data_seed=seed, **changes), SOLVERS[name](options))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_reader_is_right_a_late_one_is_not_and_a_guesser_is_at_chance(name):
    options = SMALL[name]
    task = load(name, held_out_size=300)
    assert scores(task, solved(task, SOLVERS[name](options)))["accuracy"] == 1.0
    assert scores(task, solved(task, SOLVERS[name](options), late=1))["accuracy"] < 0.6
    answers = ANSWERS[name](options)
    guesses = sum(task.count(batch) for batch in task.held_out_batches(300))
    chance = 1 / len(answers)
    assert abs(scores(task, guessed(task, answers))["accuracy"] - chance) < 5 * (chance / guesses) ** 0.5


def test_the_check_of_labels_can_fail():
    for wrong in (lambda row: {}, lambda row: dict.fromkeys(range(len(row) - 1), 9)):
        with pytest.raises(AssertionError):
            check_labels(load("mad-recall", train_on_all=False), wrong)


# MQAR


def test_mqar_is_recall_at_the_published_figures_setting():
    same = {"vocab_size": 60, "length": 24, "num_pairs": 4, "train_size": 50, "held_out_size": 9}
    mqar, recall = load("mqar", **same), load("recall", **same, random_fillers=False)
    assert mqar.data_hash == recall.data_hash
    assert mqar.model_fields == recall.model_fields | {"positions": {"kind": "learned", "length": 24}}
    assert mqar.data_hash != load("recall", **same).data_hash


@pytest.mark.parametrize(("length", "num_pairs"), PUBLISHED)
def test_mqar_has_the_published_shapes(length, num_pairs):
    task = load("mqar", length=length, num_pairs=num_pairs, vocab_size=8192, train_size=20, held_out_size=5)
    batch = task.train_batch(torch.arange(20))
    assert batch["input_ids"].shape == (20, length)
    assert task.count(batch) == 20 * num_pairs
    pairs, rest = batch["input_ids"][:, : 2 * num_pairs], batch["input_ids"][:, 2 * num_pairs :]
    assert ((pairs[:, 0::2] >= 1) & (pairs[:, 0::2] < 4096)).all()
    assert ((pairs[:, 1::2] >= 4096) & (pairs[:, 1::2] < 8192)).all()
    assert (rest != 0).sum() == 20 * num_pairs  # nothing but queries
    for row, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        known = dict(zip(row[0 : 2 * num_pairs : 2], row[1 : 2 * num_pairs : 2], strict=True))
        for place in range(2 * num_pairs, length - 1):
            assert labels[place + 1] == known.get(row[place], IGNORED)


# Induction


def test_an_earlier_trigger_is_followed_by_another_token_and_triggers_stand_anywhere():
    task = load("induction", train_size=4000, length=12)
    tokens = task.train_batch(torch.arange(4000))["input_ids"]
    assert ((tokens == 5).sum(dim=1) == 3).all()
    first, last = ((tokens == 5).nonzero()[:, 1].view(4000, 3)[:, index] for index in (0, 1))
    rows = torch.arange(4000)
    assert (tokens[rows, first + 1] != tokens[:, -1]).all()
    assert torch.equal(tokens[rows, last + 1], tokens[:, -1])
    # Of eight slots two are drawn: the first trigger is in slot s with 7 - s of the 28 pairs.
    shares = torch.bincount(first, minlength=7).double() / 4000
    assert (shares[:7] - torch.arange(7.0, 0, -1) / 28).abs().max() < 0.04


# State tracking


@pytest.mark.parametrize("group", ["Z2", "Z7", "S2", "S3", "A3", "A4", "S4", "A5"])
def test_a_group_is_a_group(group):
    table = torch.from_numpy(multiplication(group))
    order = len(table)
    assert order == (int(group[1:]) if group[0] == "Z" else len(elements(group)))
    assert torch.equal(table[0], torch.arange(order))
    assert torch.equal(table[:, 0], torch.arange(order))
    assert all(len(set(row)) == order for row in (*table.tolist(), *table.T.tolist()))
    assert torch.equal(table[table], table[:, table])  # (x y) z = x (y z)
    assert torch.equal(table, table.T) == (group[0] == "Z" or group in ("S2", "A3"))


@pytest.mark.parametrize(("group", "length"), [("Z2", 7), ("Z5", 4), ("S4", 4), ("A5", 9), ("S5", 3)])
def test_states_are_those_of_cards_that_are_exchanged(group, length):
    task = load("state-tracking", group=group, length=length, train_size=80)
    check_labels(task, lambda row: tracked(row, group))


@given(seed=st.integers(0, 999))
@settings(max_examples=20)
def test_no_word_is_drawn_twice(seed):
    task = load("state-tracking", group="Z2", length=6, data_seed=seed)
    words = [
        tuple(row)
        for batch in (task.train_batch(torch.arange(40)), *task.held_out_batches(11))
        for row in batch["input_ids"].tolist()
    ]
    assert len(words) == len(set(words)) == 51


def test_words_are_scored_by_state_by_end_and_as_a_whole():
    task = load("state-tracking", held_out_size=100)
    solver = SOLVERS["state-tracking"](SMALL["state-tracking"])
    perfect = scores(task, solved(task, solver))
    assert [perfect[name] for name in ("accuracy", "accuracy_last", "accuracy_word")] == [1.0] * 3

    def forgetful(row):
        return {place: (answer if place < 4 or row[0] else (answer + 1) % 6) for place, answer in solver(row).items()}

    found = scores(task, solved(task, forgetful))
    wrong = sum(row[0] == 0 for row in next(task.held_out_batches(100))["input_ids"].tolist()) / 100
    assert 0 < wrong < 1
    assert found["accuracy_word"] == found["accuracy_last"] == pytest.approx(1 - wrong)
    assert found["accuracy"] == pytest.approx(1 - wrong / 5)


# Relations


def test_training_never_asks_about_the_second_half_of_relations_backwards():
    task = load("relations", train_size=500, held_out_size=500)
    for batch, expected in (
        (task.train_batch(torch.arange(500)), {3, 4}),
        (next(task.held_out_batches(500)), {3, 4, 5, 6}),
    ):
        tokens = batch["input_ids"]
        rows, places = (tokens == 2).nonzero(as_tuple=True)
        assert set(tokens[rows, places - 1].tolist()) == expected
        rows, places = (tokens == 1).nonzero(as_tuple=True)
        assert set(tokens[rows, places - 1].tolist()) == {3, 4, 5, 6}


def test_every_name_beats_one_and_is_beaten_by_one_and_never_by_whom_it_beats():
    task = load("relations", num_entities=3, num_relations=3, train_size=200)
    for row in task.train_batch(torch.arange(200))["input_ids"].tolist():
        facts = [tuple(row[place : place + 3]) for place in range(0, 27, 3)]
        for relation in {relation for _, relation, _ in facts}:
            beats = {winner: loser for winner, held, loser in facts if held == relation}
            assert len(beats) == len(set(beats.values())) == 3
            assert all(beats[beats[name]] != name != beats[name] for name in beats)


def test_a_reader_without_direction_is_right_by_half_and_reversed_by_half():
    task, first = load("relations", held_out_size=400), 7
    perfect = scores(task, solved(task, lambda row: related(row, first)))
    assert [perfect[f"accuracy_{kind}"] for kind in ("whom", "who", "unseen")] == [1.0] * 3
    assert perfect["reversed"] == 0.0
    confused = scores(
        task, solved(task, lambda row: related(row, first, lambda place: (row[0] + row[1] + place // 4) % 2 == 0))
    )
    assert confused["accuracy"] == pytest.approx(0.5, abs=0.05)
    assert confused["reversed"] == pytest.approx(1 - confused["accuracy"])
    one_way = scores(task, solved(task, lambda row: related(row, first, lambda place: row[place + 1] == 2)))
    assert (one_way["accuracy_whom"], one_way["accuracy_who"], one_way["accuracy_unseen"]) == (1.0, 0.0, 0.0)
    assert one_way["reversed"] == pytest.approx(1 - one_way["accuracy"])


# Multi-hop


@pytest.mark.parametrize(("count", "rows"), [(2, 50), (3, 4000), (5, 4000)])
def test_rings_are_rings_and_all_equally_likely(count, rows):
    following = torch.from_numpy(rings(generator(0, "test"), rows, count))
    place = torch.zeros(rows, 1, dtype=torch.long)
    for step in range(1, count + 1):
        place = following.gather(1, place)
        assert ((place == 0) == (step == count)).all()
    found, counts = following.unique(dim=0, return_counts=True)
    assert len(found) == math.factorial(count - 1)
    assert ((counts - rows / len(found)).abs() < 5 * (rows / len(found)) ** 0.5).all()


def test_hops_are_scored_apart():
    task = load("multihop", held_out_size=300, num_entities=6)

    def one_step(row):
        return walked([1 if 1 <= token <= 3 else token for token in row], 3)

    found = scores(task, solved(task, one_step))
    assert (found["accuracy_1"], found["accuracy_2"], found["accuracy_3"]) == (1.0, 0.0, 0.0)
    assert found["accuracy"] == pytest.approx(1 / 3, abs=0.07)
    single = load("multihop", max_hops=1)
    assert set(scores(single, solved(single, lambda row: walked(row, 1)))) == {"loss", "accuracy", "accuracy_1"}


# All of them

HASHES = {
    "mqar": "afe171386ae820b7f07ea6553c5f991b5ca5d3eff9e6200921d6163f3be97cbf",
    "mad-recall": "7bb8c0edf7728350350fd0b244f13b2cfe3233f1406cfe44106a6dfe49db0f2f",
    "mad-noisy-recall": "0d56fe6d4411b5e81523304c28bcf03b5fa4a07452cfef4024b035bb2d194b86",
    "mad-fuzzy-recall": "bcba38bfe40a7def7c807a026debaa1d5418206152c716c045e50bb201f74329",
    "mad-memorization": "81b42c2d74d778b05ebee03c206232cfa52a0d8d3fd248ee34d7cebf877fc9cb",
    "mad-compression": "ec12533452c35ee09e6b15159a58e89950187b2508413a8dee5f7090c175aeb2",
    "selective-copy": "b6a87f96409b715650d3470e8080dbecac33936aa48a93e1d7fb8176f4f61bb4",
    "mad-selective-copying": "161f335f84b0f560d4a03d1f90855bcb6349779020b55be6614175741b75df7b",
    "induction": "412227709e8aeaa63915d501d2ecf315b568bcc09e6b81b39ac1e0c5b9572c5b",
    "state-tracking": "5abb518081239fe3ed27a80cfcd91fd85d88a4d3450065adff2bd976eef34433",
    "relations": "d4f877f40eb1ac825bd6efb242ab776aa9df897814b9d4d136e0384d1445a884",
    "multihop": "c2f1e006f59eaff617f2e38fbba11ebc3f0aa8374ad2d32b09d61f5fcd7b3543",
    "automata": "d7d206ceff86171d7d82bb11b2ca37e6fbfccbac3c5a191f1704f277dc60ecc7",
    "capacity": "721102c5695e113625936a11fb7978112187b5486967f82731016621b8073f21",
}


def test_the_data_of_a_seed_are_the_same_for_ever():
    assert {name: load(name).data_hash for name in HASHES} == HASHES


def test_documented_examples_run():
    for module in (capacity, state_tracking):
        outcome = doctest.testmod(module)
        assert outcome.attempted > 0
        assert outcome.failed == 0


def test_the_page_has_every_task_and_its_chance():
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| (?:about )?1/(\d+)[^|]*\|$", PAGE.read_text(), re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(kind.name for module in SEPARATING for kind in module.KINDS)
    for name, parts in rows:
        if name in ANSWERS:
            assert len(ANSWERS[name](asdict(TASKS[name].options()))) == int(parts), name


@pytest.mark.parametrize("name", HASHES)
def test_the_trainer_takes_it(tmp_path, name):
    spec = TaskSpec(name=name, options=SMALL[name])
    task = load_task(spec)
    model = {
        "tie": "(Q, K=V)", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4,
        "intermediate_size": 16,
    } | dict(task.model_fields)  # fmt: skip
    training = TrainingSpec(steps=2, batch_size=4, learning_rate=1e-3, accumulation_steps=2)
    outcome = train(RunSpec(task=spec, model=ModelSpec.from_dict(model), training=training, seed=0), tmp_path)
    assert outcome.data_hash == HASHES[name]
    assert 0 <= outcome.scores["accuracy"] <= 1


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("relations", {"num_entities": 2}, "num_entities is 2, but it must be from 3 (in a ring of two, direction is lost) to 9"),
        ("relations", {"num_questions": 9}, "num_questions is 9, but it must be at most 8"),
        ("relations", {"num_relations": 5}, "num_relations is 5, but it must be from 1 to 4"),
        ("relations", {"vocab_relations": 1}, "vocab_relations is 1, but it must be from 2 to 1000"),
        ("multihop", {"max_hops": 5}, "max_hops is 5, but it must be from min_hops = 1 to 4: more steps lead around the ring"),
        ("multihop", {"num_questions": 6}, "num_questions is 6, but it must be at most 5"),
        ("state-tracking", {"group": "A6"}, "group is 'A6', but it must be Z2 to Z255, S2 to S5, or A3 to A5"),
        ("state-tracking", {"group": "Z1"}, "group is 'Z1', but it must be Z2 to Z255"),
        ("state-tracking", {"group": "Z300"}, "group is 'Z300', but it must be Z2 to Z255"),
        ("state-tracking", {"group": "z2"}, "group is 'z2', but it must be Z2 to Z255"),
        ("state-tracking", {"group": "Z2"}, "length is 5, but it must be more: Z2 has 32 words of that length, and at least 63 are needed"),
        ("induction", {"length": 5}, "length is 5, but it must be at least 6: 2 triggers and what follows each, and both again"),
        ("induction", {"vocab_size": 2}, "vocab_size is 2, but it must be from 3"),
    ],
)  # fmt: skip
def test_a_mistake_gets_its_sentence(name, options, sentence):
    with pytest.raises(TwofoldError) as caught:
        load(name, **options)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
