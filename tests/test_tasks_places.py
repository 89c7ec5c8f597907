"""Scores by place: buckets are a partition, and recall files each query under its own distance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from task_fixture import load, totals_of
from twofold.tasks.buckets import buckets, ranges_in, sums


@given(first=st.integers(1, 40), length=st.integers(0, 3000), start=st.sampled_from([1, 2, 4, 16]))
def test_buckets_are_a_partition_that_begins_at_powers_of_two(first, length, start):
    found = buckets(first, first + length, start=start)
    assert [number for low, high in found for number in range(low, high + 1)] == list(range(first, first + length + 1))
    assert all(low & (low - 1) == 0 for low, _ in found[1:])
    assert all(high & (high + 1) == 0 for _, high in found[:-1])


def test_sums_go_to_the_bucket_of_their_place():
    places = torch.tensor([[1, 2], [3, 9]])
    found = sums(places, {"loss": torch.tensor([[1.0, 2.0], [4.0, 8.0]])}, [(1, 2), (3, 8)])
    assert {name: value.item() for name, value in found.items()} == {"loss@1-2": 3.0, "loss@3-8": 4.0}
    assert all(value.dtype == torch.float64 for value in found.values())
    assert dict(ranges_in({"loss@1-2": 3.0, "loss": 7.0, "count@3-8": 1.0}, "loss")) == {"1-2": 3.0}


OPTIONS = {"vocab_size": 40, "num_pairs": 3, "length": 40, "power": 1.0, "held_out_size": 60, "by_distance": True}


@pytest.mark.parametrize("name", ["recall", "mqar"])
def test_a_query_is_filed_under_its_distance(name: str):
    """A model that answers queries of 8 to 15 tokens' distance, and no other, is right there and nowhere else."""
    task = load(name, **OPTIONS)
    (batch,) = task.held_out_batches(1000)
    logits = torch.zeros(*batch["labels"].shape, 40)
    asked: dict[int, int] = {}
    for row, (tokens, labels) in enumerate(zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)):
        keys = dict(zip(tokens[0:6:2], (0, 2, 4), strict=True))
        for place in range(1, 40):
            if labels[place] >= 0:
                distance = place - 1 - keys[tokens[place - 1]]
                asked[distance] = asked.get(distance, 0) + 1
                if 8 <= distance <= 15:
                    logits[row, place - 1, labels[place]] = 1
    totals = totals_of(task, [batch], lambda _: logits)
    ranges = [(2, 3), (4, 7), (8, 15), (16, 31), (32, 38)]
    for low, high in ranges:
        assert totals[f"asked@{low}-{high}"] == sum(
            count for distance, count in asked.items() if low <= distance <= high
        )
    assert sum(totals[f"asked@{low}-{high}"] for low, high in ranges) == totals["count"] == 3 * 60
    scores = task.scores(totals)
    assert scores["accuracy@8-15"] == 1
    assert [scores[f"accuracy@{low}-{high}"] for low, high in ranges if low != 8] == [0] * 4
    parts = sum(scores[f"accuracy@{low}-{high}"] * totals[f"asked@{low}-{high}"] for low, high in ranges)
    assert parts == pytest.approx(scores["accuracy"] * totals["count"])


def test_what_is_not_asked_for_is_not_measured():
    for name, options in (("recall", {**OPTIONS, "by_distance": False}), ("text", {})):
        task = load(name, **options)
        batch = next(iter(task.held_out_batches(2)))
        assert set(task.measure(torch.zeros(*batch["labels"].shape, 256), batch)) == {"loss", "correct", "count"}
    assert load("recall", **OPTIONS).data_hash == load("recall", **OPTIONS | {"by_distance": False}).data_hash
