"""Small tasks of every kind that needs no file, and the sums of a model over batches."""

from __future__ import annotations

from typing import Any

import torch

from twofold.task_spec import TaskSpec
from twofold.tasks import Task, load_task

LISTS = {"length": 6, "train_size": 40, "held_out_size": 11}
SMALL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("reverse", "sort", "sub", "swap", "copy"), LISTS),
    "recall": {"vocab_size": 40, "num_pairs": 3, "length": 14, "train_size": 40, "held_out_size": 11},
    "mqar": {"vocab_size": 40, "num_pairs": 3, "length": 14, "train_size": 40, "held_out_size": 11},
    "mad-recall": {"vocab_size": 10, "length": 16, "train_size": 40, "held_out_size": 11},
    "mad-noisy-recall": {
        "vocab_size": 14,
        "noise_vocab_size": 5,
        "noise": 0.4,
        "length": 20,
        "train_size": 40,
        "held_out_size": 11,
    },
    "mad-fuzzy-recall": {
        "vocab_size": 12,
        "key_tokens": 2,
        "value_tokens": 3,
        "length": 30,
        "train_size": 40,
        "held_out_size": 11,
    },
    "mad-memorization": {"vocab_size": 16, "length": 6, "train_size": 40, "held_out_size": 11},
    "mad-compression": {"vocab_size": 5, "length": 6, "train_size": 40, "held_out_size": 11},
    "selective-copy": {"vocab_size": 7, "length": 19, "num_tokens": 3, "train_size": 40, "held_out_size": 11},
    "mad-selective-copying": {"vocab_size": 7, "length": 19, "num_tokens": 3, "train_size": 40, "held_out_size": 11},
    "induction": {"vocab_size": 6, "length": 13, "num_triggers": 2, "train_size": 40, "held_out_size": 11},
    "state-tracking": {"group": "S3", "length": 5, "train_size": 40, "held_out_size": 11},
    "relations": {
        "vocab_entities": 9,
        "vocab_relations": 4,
        "num_entities": 4,
        "num_relations": 2,
        "num_questions": 5,
        "train_size": 40,
        "held_out_size": 11,
    },
    "multihop": {"vocab_entities": 9, "num_entities": 5, "num_questions": 3, "train_size": 40, "held_out_size": 11},
    "automata": {
        "num_symbols": 5,
        "min_states": 3,
        "max_states": 4,
        "max_edges": 2,
        "min_strings": 2,
        "max_strings": 4,
        "max_length": 6,
        "train_size": 40,
        "held_out_size": 11,
    },
    "capacity": {
        "dimension": 12,
        "num_patterns": 4,
        "num_values": 3,
        "num_cues": 2,
        "noise": 0.1,
        "train_size": 40,
        "held_out_size": 11,
    },
    "arithmetic": {"digits": 2, "train_size": 40, "held_out_size": 11},
    "list-functions": {"max_depth": 1, "max_length": 4, "train_size": 40, "held_out_size": 11},
    "deduction": {"letters": 8, "train_size": 40, "held_out_size": 11},
    "word-problems": {"train_size": 40, "held_out_size": 11},
    "digits": {"held_out_size": 11},
    "anomaly": {"train_size": 40, "held_out_size": 11, "set_size": 5},
    "text": {"context": 17, "max_bytes": 3_000, "held_out_bytes": 299},
}


def load(name: str, **changes: Any) -> Task:
    return load_task(TaskSpec(name=name, options=SMALL.get(name, {}) | changes))


def totals_of(task: Task, batches, logits_of) -> dict[str, float]:
    totals: dict[str, float] = {}
    for batch in batches:
        for name, value in task.measure(logits_of(batch), batch).items():
            assert value.dtype == torch.float64
            assert value.ndim == 0
            totals[name] = totals.get(name, 0.0) + value.item()
    return totals
