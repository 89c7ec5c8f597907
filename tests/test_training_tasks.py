"""Every kind of task goes through the one trainer, by its name and options alone."""

from __future__ import annotations

import pytest

from twofold.spec import ModelSpec
from twofold.task_spec import TaskSpec
from twofold.tasks import load_task
from twofold.training.spec import RunSpec, TrainingSpec
from twofold.training.trainer import train

SIZES = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4,
    "intermediate_size": 16,
}  # fmt: skip
SMALL = {
    "reverse": {"length": 4, "train_size": 16, "held_out_size": 8},
    "sort": {"length": 4, "train_size": 16, "held_out_size": 8},
    "recall": {"train_size": 16, "held_out_size": 8},
    "digits": {},
    "text": {"context": 32},
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("tie", ["(Q, K=V)", "V = Q - K"])
def test_every_task_trains(tmp_path, name, tie):
    if name == "digits":
        pytest.importorskip("sklearn")
    spec = TaskSpec(name=name, options=SMALL[name])
    task = load_task(spec)
    run = RunSpec(
        task=spec,
        model=ModelSpec.from_dict(SIZES | dict(task.model_fields) | {"tie": tie}),
        training=TrainingSpec(steps=2, batch_size=4, learning_rate=1e-3, accumulation_steps=2),
        seed=0,
    )
    seen = []
    # Scoring all that is held out would be most of this test's time.
    task.held_out_batches = lambda batch_size, whole=task.held_out_batches: iter([next(iter(whole(batch_size)))])
    outcome = train(run, tmp_path, task=task, report=seen.append)
    assert {task.loss_metric, task.score} <= outcome.scores.keys()
    assert outcome.data_hash == task.data_hash
    assert outcome.tokens == 2 * 4 * task.tokens_per_example
    assert seen[-1].loss > 0


def test_a_task_is_loaded_by_its_name(tmp_path):
    spec = TaskSpec(name="sort", options=SMALL["sort"])
    run = RunSpec(
        task=spec,
        model=ModelSpec.from_dict(SIZES | dict(load_task(spec).model_fields) | {"tie": "(Q, K, V)"}),
        training=TrainingSpec(steps=1, batch_size=4, learning_rate=1e-3),
        seed=0,
    )
    assert train(run, tmp_path).data_hash == load_task(spec).data_hash
