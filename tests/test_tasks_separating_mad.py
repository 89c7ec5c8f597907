"""MAD's tasks and selective copying, against readers who solve them from the tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from task_fixture import SMALL, load
from task_solvers import scores
from twofold.errors import TwofoldError
from twofold.tasks import IGNORED, TASKS

RECALLS = ["mad-recall", "mad-noisy-recall", "mad-fuzzy-recall"]


@pytest.mark.parametrize("name", RECALLS)
def test_mads_recalls_train_on_every_token_but_padding_and_are_scored_on_answers(name):
    options = SMALL[name]
    every, answers = load(name), load(name, train_on_all=False)
    rows = torch.arange(40)
    batch, scored = every.train_batch(rows), answers.train_batch(rows)
    assert torch.equal(batch["input_ids"], scored["input_ids"])
    padding = options["vocab_size"] - 1 if name == "mad-fuzzy-recall" else -1
    text = batch["input_ids"] != padding
    assert torch.equal(batch["labels"], batch["input_ids"].where(text, torch.tensor(IGNORED)))
    assert 0 < answers.count(scored) < every.count(batch)
    assert torch.equal(next(every.held_out_batches(11))["labels"], next(answers.held_out_batches(11))["labels"])


def test_a_fuzzy_key_is_long_when_held_out_and_of_any_length_in_training():
    task, keys = load("mad-fuzzy-recall", train_size=200), (SMALL["mad-fuzzy-recall"]["vocab_size"] - 1) // 2
    found = {}
    for part, batch in (("train", task.train_batch(torch.arange(200))), ("held_out", next(task.held_out_batches(11)))):
        runs = set()
        for row in batch["input_ids"].tolist():
            text = "".join("k" if token < keys else "v" if token < 11 else " " for token in row).strip()
            runs |= {len(run) for run in text.split("v") if run}
        found[part] = runs
    assert found == {"train": {1, 2}, "held_out": {2}}


def test_noise_stands_in_pairs_about_as_often_as_said():
    task = load("mad-noisy-recall", train_size=2000)
    noisy = task.train_batch(torch.arange(2000))["input_ids"] >= 9
    assert torch.equal(noisy[:, 0::2], noisy[:, 1::2])
    assert not noisy[:, -1].any()
    # Of the nine pairs before the last, one is spared.
    assert abs(noisy[:, :-2:2].double().sum(dim=1).mean() - 8 * 0.4) < 0.15


@given(seed=st.integers(0, 99))
@settings(max_examples=25)
def test_a_memorized_key_has_one_value_everywhere(seed):
    task = load("mad-memorization", data_seed=seed)
    values: dict[int, set[int]] = {}
    for batch in (task.train_batch(torch.arange(40)), *task.held_out_batches(11)):
        for row, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            assert labels[0::2] == [IGNORED] * 3
            assert row[1::2] == [15] * 3
            for key, value in zip(row[0::2], labels[1::2], strict=True):
                assert 0 <= key < 7 <= value < 15
                values.setdefault(key, set()).add(value)
    assert all(len(found) == 1 for found in values.values())
    assert len({*map(min, values.values())}) == len(values)


def test_compression_asks_for_every_place_once_and_scores_all_of_them():
    task = load("mad-compression")
    assert task.train_size == 40 * 5
    batch = task.train_batch(torch.arange(task.train_size))
    for index, (row, labels) in enumerate(zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)):
        assert labels[:-1] == [IGNORED] * 5
        place, token = divmod(labels[-1], 4)
        assert (place, row[place], row[-1]) == (index % 5, token, 4)
        assert row == batch["input_ids"][index - index % 5].tolist()

    def reading(places: int):
        """Somebody who can read that many of the places, and takes the others for 0."""

        def logits_of(batch):
            right = torch.nn.functional.one_hot(batch["input_ids"][:, :-1], 4).float()
            right[:, places:] = torch.tensor([1.0, 0, 0, 0])
            return right.flatten(1)[:, None].expand(-1, 6, -1)

        return logits_of

    assert scores(task, reading(5))["accuracy"] == 1.0
    assert scores(load("mad-compression", held_out_size=2000), reading(0))["accuracy"] == pytest.approx(1 / 4, abs=0.02)


def test_mambas_tokens_stand_anywhere_and_mads_last_one_before_the_mark():
    tasks = {name: load(name, train_size=4000) for name in ("selective-copy", "mad-selective-copying")}
    places = {}
    for name, task in tasks.items():
        tokens = task.train_batch(torch.arange(4000))["input_ids"]
        body = tokens[:, : -3 if name == "selective-copy" else -4]
        assert ((body < 5).sum(dim=1) == 3).all()
        places[name] = (body < 5).double().mean(dim=0)
    assert (places["selective-copy"] - 3 / 16).abs().max() < 5 * (3 / 16 / 4000) ** 0.5
    assert places["mad-selective-copying"][-1] == 1.0


DEFAULTS = {
    "mad-recall": {"vocab_size": 16, "length": 128, "train_size": 12_800, "held_out_size": 1_280, "train_on_all": True},
    "mad-noisy-recall": {"vocab_size": 32, "noise_vocab_size": 16, "noise": 0.2, "length": 128, "train_size": 12_800},
    "mad-fuzzy-recall": {"vocab_size": 16, "key_tokens": 3, "value_tokens": 3, "length": 128, "train_size": 12_800},
    "mad-memorization": {"vocab_size": 256, "length": 32, "train_size": 256, "held_out_size": 1_280},
    "mad-compression": {"vocab_size": 16, "length": 32, "train_size": 12_800, "held_out_size": 1_280},
    "mad-selective-copying": {"vocab_size": 16, "length": 256, "num_tokens": 16, "train_size": 12_800},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_defaults_are_mads_baseline(name):
    options = TASKS[name].options()
    assert {field: getattr(options, field) for field in DEFAULTS[name]} == DEFAULTS[name]


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("mad-recall", {"length": 7}, "length is 7, but it must be even"),
        ("mad-recall", {"vocab_size": 3}, "vocab_size is 3, but it must be from 4 to 32767"),
        ("mad-noisy-recall", {"noise": 1.0}, "noise is 1.0, but it must be from 0 up to, not including, 1"),
        ("mad-noisy-recall", {"noise_vocab_size": 11}, "noise_vocab_size is 11, but it must be from 1 to 10, to leave two keys"),
        ("mad-fuzzy-recall", {"vocab_size": 6}, "vocab_size is 6, but it must be at least 7"),
        ("mad-fuzzy-recall", {"length": 14}, "length is 14, but it must be at least 15, for three of the longest pairs"),
        ("mad-memorization", {"length": 5}, "length is 5, but it must be even"),
        ("selective-copy", {"length": 6}, "length is 6, but it must be at least 7: 3 tokens, twice, and a mark"),
        ("selective-copy", {"vocab_size": 3}, "vocab_size is 3, but it must be from 4"),
    ],
)  # fmt: skip
def test_a_mistake_gets_its_sentence(name, options, sentence):
    with pytest.raises(TwofoldError) as caught:
        load(name, **options)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
