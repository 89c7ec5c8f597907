"""Lists, recall and sets against oracles written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from task_fixture import load, totals_of
from twofold.errors import TwofoldError
from twofold.tasks import IGNORED
from twofold.tasks.anomaly import digit_features

ORACLES = {
    "reverse": lambda digits: [digits[len(digits) - 1 - i] for i in range(len(digits))],
    "sort": sorted,
    "sub": lambda digits: [9 - digit for digit in digits],
    "swap": lambda digits: digits[len(digits) // 2 :] + digits[: len(digits) // 2],
    "copy": lambda digits: digits,
}


@pytest.mark.parametrize("name", ORACLES)
@given(half=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_the_label_of_every_digit_is_the_oracles(name, half, seed):
    task = load(name, length=2 * half, data_seed=seed, train_size=3, held_out_size=3)
    for batch in (task.train_batch(torch.arange(3)), *task.held_out_batches(3)):
        assert batch["labels"].tolist() == [ORACLES[name](digits) for digits in batch["input_ids"].tolist()]
        assert batch["labels"].dtype == torch.int64


def test_digits_are_uniform_and_the_parts_differ():
    task = load("copy", length=50, train_size=1000, held_out_size=1000)
    digits = task.train_batch(torch.arange(1000))["input_ids"]
    counts = torch.bincount(digits.flatten(), minlength=10)
    assert len(counts) == 10
    assert ((counts - 5000).abs() < 5 * 5000**0.5).all()
    assert not torch.equal(digits, next(task.held_out_batches(1000))["input_ids"])


# Recall


def recalled(row: list[int], num_pairs: int) -> dict[int, int]:
    """Place -> the value that is due as the next token there: what a reader who remembers the pairs answers."""
    known = dict(zip(row[0 : 2 * num_pairs : 2], row[1 : 2 * num_pairs : 2], strict=True))
    return {place: known[token] for place, token in enumerate(row) if place >= 2 * num_pairs and token in known}


def answers(batch, num_pairs: int, vocab_size: int, shift: int = 0) -> torch.Tensor:
    """The logits of a perfect recaller, each answer ``shift`` places late."""
    logits = torch.zeros(*batch["input_ids"].shape, vocab_size)
    for index, row in enumerate(batch["input_ids"].tolist()):
        for place, value in recalled(row, num_pairs).items():
            if place + shift < len(row):
                logits[index, place + shift, value] = 50.0
    return logits


@pytest.mark.parametrize("random_fillers", [True, False])
def test_a_perfect_recaller_is_perfect_and_a_late_one_is_not(random_fillers):
    task = load("recall", random_fillers=random_fillers)

    def accuracy(shift: int) -> float:
        return task.scores(totals_of(task, task.held_out_batches(4), lambda batch: answers(batch, 3, 40, shift)))[
            "accuracy"
        ]

    assert accuracy(0) == 1.0
    assert accuracy(1) < 0.2
    assert load("recall").train_batch(torch.tensor([0]))["labels"].shape == (1, 14)


@given(
    pairs=st.integers(1, 5), spare=st.integers(0, 4), power=st.sampled_from([0.01, 1.0, 3.0]), seed=st.integers(0, 999)
)
def test_every_pair_is_asked_for_once_behind_all_pairs(pairs, spare, power, seed):
    length = 4 * pairs + 2 * spare
    vocab_size = 2 * pairs + 3
    task = load(
        "recall",
        num_pairs=pairs,
        length=length,
        vocab_size=vocab_size,
        power=power,
        data_seed=seed,
        random_fillers=False,
        held_out_size=1,  # of a pair without room there are not many
    )
    batch = task.train_batch(torch.arange(8))
    assert task.count(batch) == 8 * pairs
    for row, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= key < vocab_size // 2 <= value < vocab_size for key, value in zip(keys, values, strict=True))
        due = recalled(row, pairs)
        assert len(due) == pairs
        assert {place - 1: label for place, label in enumerate(labels) if label != IGNORED} == due


def test_a_small_power_asks_soon_and_power_1_anywhere():
    def distances(power: float) -> torch.Tensor:
        task = load("recall", num_pairs=1, length=42, power=power, train_size=4000, random_fillers=False)
        labels = task.train_batch(torch.arange(4000))["labels"]
        return ((labels != IGNORED).nonzero()[:, 1] - 3) // 2  # slot of the query, from 0 to 19

    soon, anywhere = (torch.bincount(distances(power), minlength=20).double() / 4000 for power in (0.01, 1.0))
    assert (anywhere - 1 / 20).abs().max() < 5 * (0.05 / 4000) ** 0.5
    weights = torch.arange(1.0, 21.0) ** -0.99
    assert (soon - weights / weights.sum()).abs().max() < 0.04


# Sets


def test_a_set_holds_one_item_of_another_class_and_no_item_twice():
    features, labels = digit_features()
    task = load("anomaly", train_size=300)
    for part in (task.train, task.held_out):
        for items, odd in zip(part["items"].tolist(), part["labels"].tolist(), strict=True):
            classes = labels[items]
            assert sum(odd) == 1
            others = classes[np.array(odd) == 0]
            assert len(set(others)) == 1
            assert classes[odd.index(1)] != others[0]
            assert len(set(items)) == len(items)
    assert not set(task.train["items"].flatten().tolist()) & set(task.held_out["items"].flatten().tolist())
    batch = task.train_batch(torch.tensor([5]))
    assert batch["features"].shape == (1, 5, features.shape[1])
    places = torch.bincount(task.train["labels"].argmax(dim=1).long(), minlength=5)
    assert (places > 30).all()


def test_features_are_of_the_image_and_of_mean_0_over_training_items():
    features, _ = digit_features()
    assert len(np.unique(features, axis=0)) > 1700
    task = load("anomaly", train_size=4000)
    values = task.train_batch(torch.arange(4000))["features"]
    assert values.mean().abs() < 0.05
    assert 0.8 < values.std() < 1.2


def test_the_score_counts_sets_in_which_the_odd_item_leads():
    task = load("anomaly")
    batch = task.train_batch(torch.arange(8))
    # A model that calls every item usual, but the odd one least so: each label by itself is guessed as 0, every set is right.
    logits = torch.stack([torch.full(batch["labels"].shape, 5.0), batch["labels"].float()], dim=-1)
    sums = {name: value.item() for name, value in task.measure(logits, batch).items()}
    assert task.scores(sums)["accuracy"] == 1.0
    assert sums["correct"] == 8 * 4
    logits[:4, :, 1] *= -1
    sums = {name: value.item() for name, value in task.measure(logits, batch).items()}
    assert task.scores(sums)["accuracy"] == 0.5


def table(num_items: int = 40) -> dict[str, np.ndarray]:
    draws = np.random.default_rng(0)
    return {"features": draws.normal(size=(num_items, 3)).astype(np.float32), "labels": np.arange(num_items) % 2}


def write(path, arrays) -> None:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".safetensors":
        save_file(arrays, path)
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({name: array.tolist() for name, array in arrays.items()}), path)


def test_features_of_a_file_are_the_same_in_every_format(tmp_path):
    hashes = set()
    for suffix in ("npz", "safetensors", "parquet"):
        path = tmp_path / f"items.{suffix}"
        write(path, table())
        task = load("anomaly", path=str(path))
        assert task.model_fields["feature_size"] == 3
        hashes.add(task.data_hash)
    assert len(hashes) == 1
    changed = table()
    changed["features"][0, 0] += 1
    write(tmp_path / "items.npz", changed)
    assert load("anomaly", path=str(tmp_path / "items.npz")).data_hash not in hashes


@pytest.mark.parametrize(
    ("suffix", "change", "sentence"),
    [
        ("npz", lambda arrays: arrays.pop("labels"), "holds no array 'labels'"),
        ("safetensors", lambda arrays: arrays.pop("features"), "holds no array 'features'"),
        ("parquet", lambda arrays: arrays.pop("labels"), "has no column 'labels'; its columns are features"),
        ("npz", lambda arrays: arrays.update(labels=np.zeros(40, dtype=int)), "all items are of one class"),
        ("npz", lambda arrays: arrays.update(labels=np.zeros(7, dtype=int)), "must hold features (items, F) and whole labels (items,)"),
        ("npz", lambda arrays: arrays.update(labels=np.zeros(40)), "must hold features (items, F) and whole labels (items,)"),
        ("npz", lambda arrays: arrays["features"].fill(np.nan), "features that are not finite numbers"),
        ("npz", lambda arrays: arrays.update(features=np.array(["x"] * 40)), "cannot be read as features and labels"),
    ],
)  # fmt: skip
def test_a_file_of_features_that_does_not_fit(tmp_path, suffix, change, sentence):
    arrays = table()
    change(arrays)
    write(tmp_path / f"items.{suffix}", arrays)
    with pytest.raises(TwofoldError) as caught:
        load("anomaly", path=str(tmp_path / f"items.{suffix}"))
    assert sentence in str(caught.value)


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "parquet", "txt"])
@pytest.mark.parametrize("content", [b"", b"nothing of the kind", None])
def test_a_broken_file_of_features(tmp_path, suffix, content):
    path = tmp_path / f"items.{suffix}"
    if content is None and suffix != "txt":
        write(path, table())
        path.write_bytes(path.read_bytes()[:-60])
    else:
        path.write_bytes(content or b"")
    with pytest.raises(TwofoldError) as caught:
        load("anomaly", path=str(path))
    assert "\n" not in str(caught.value)


def test_a_file_of_features_that_is_not_there():
    with pytest.raises(TwofoldError, match=r"There is no file nowhere\.npz"):
        load("anomaly", path="nowhere.npz")
