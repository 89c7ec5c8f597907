"""Tasks that separate architectures: each against a slow reader who solves it from the tokens alone, and a small model that learns it."""

from __future__ import annotations

import pytest
import torch

from task_fixture import load
from twofold.tasks import IGNORED

PUBLISHED = [(64, 4), (128, 8), (256, 16), (512, 64)]


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
