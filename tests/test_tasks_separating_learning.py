"""A small model learns something measurable of every task that separates architectures, on an easy setting."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from task_fixture import load
from twofold.models import build_model
from twofold.spec import ModelSpec
from twofold.tasks import Task
from twofold.training.evaluation import evaluate

MODEL: dict[str, Any] = {
    "tie": "(Q, K, V)",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "positions": {"kind": "rotary"},
    "initializer_range": 0.1,
}
# Task -> options, steps, and an accuracy that is reached with room to spare and is far above a guesser's.
LONG = ("mad-noisy-recall", "mad-fuzzy-recall", "mad-selective-copying", "mad-compression", "induction", "automata")
EASY: dict[str, tuple[dict[str, Any], int, float]] = {
    "mqar": ({"vocab_size": 10, "num_pairs": 2, "length": 8, "train_size": 4000}, 250, 0.9),
    "mad-recall": ({"vocab_size": 8, "length": 16, "train_size": 2000, "train_on_all": False}, 250, 0.8),
    "mad-noisy-recall": ({"vocab_size": 8, "noise_vocab_size": 2, "length": 16, "train_size": 2000, "train_on_all": False}, 250, 0.55),
    "mad-fuzzy-recall": ({"vocab_size": 7, "key_tokens": 1, "value_tokens": 2, "length": 16, "train_size": 2000, "train_on_all": False}, 250, 0.65),
    "mad-memorization": ({"vocab_size": 16, "length": 8, "train_size": 200}, 100, 0.9),
    "mad-compression": ({"vocab_size": 4, "length": 6, "train_size": 500, "held_out_size": 40}, 300, 0.7),
    "selective-copy": ({"vocab_size": 4, "length": 13, "num_tokens": 2, "train_size": 2000}, 250, 0.95),
    "mad-selective-copying": ({"vocab_size": 5, "length": 11, "num_tokens": 2, "train_size": 2000, "held_out_size": 20}, 300, 0.9),
    "induction": ({"vocab_size": 5, "length": 10, "train_size": 4000}, 200, 0.8),
    "state-tracking": ({"group": "Z3", "length": 4, "train_size": 50, "held_out_size": 14}, 200, 0.75),
    "relations": ({"vocab_entities": 3, "vocab_relations": 2, "num_entities": 3, "num_relations": 1, "num_questions": 3, "train_size": 4000}, 250, 0.65),
    "multihop": ({"vocab_entities": 3, "num_entities": 3, "num_questions": 3, "max_hops": 1, "train_size": 4000}, 150, 0.8),
    "automata": ({"num_symbols": 8, "max_edges": 1, "min_states": 2, "max_states": 3, "min_strings": 5, "max_strings": 5, "max_length": 5, "train_size": 400}, 150, 0.5),
    "capacity": ({"dimension": 8, "num_patterns": 2, "num_values": 2, "num_cues": 2, "noise": 0.0, "train_size": 1000}, 200, 0.8),
}  # fmt: skip


def learned(task: Task, steps: int) -> dict[str, float]:
    model = build_model(ModelSpec.from_dict(MODEL | dict(task.model_fields)), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    draws = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(0, task.train_size, (32,), generator=draws)
        optimizer.zero_grad()
        model(**task.train_batch(rows)).loss.backward()
        optimizer.step()
        schedule.step()
    return evaluate(model, task, batch_size=100)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in EASY])
def test_a_small_model_learns_it(name):
    options, steps, reached = EASY[name]
    scores = learned(load(name, **{"held_out_size": 100} | options), steps)
    assert scores["accuracy"] >= reached, scores
