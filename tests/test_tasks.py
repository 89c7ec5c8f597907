"""What every task keeps: data made again from its options, batches that a model takes, sums that add up, one sentence for a mistake."""

from __future__ import annotations

import doctest
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, fields, is_dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import twofold.tasks
from task_fixture import LISTS, SMALL, load, totals_of
from twofold.errors import TwofoldError
from twofold.models import build_model
from twofold.models.sequence import IGNORED as IGNORED_BY_MODELS
from twofold.spec import ModelSpec
from twofold.task_spec import TaskSpec
from twofold.tasks import IGNORED, TASKS, Task, load_task
from twofold.tasks.extras import data_library
from twofold.tasks.options import Options, read_options
from twofold.tasks.task import distinct, generator


@pytest.fixture(params=SMALL, scope="module")
def task(request) -> Task:
    return load(request.param)


def test_every_kind_is_in_the_registry_under_its_name_and_has_checked_options():
    assert set(TASKS) == {*SMALL, "images"}
    for name, kind in TASKS.items():
        assert kind.name == name
        assert is_dataclass(kind.options)
        assert issubclass(kind.options, Options)
        assert kind.summary


def test_a_task_says_what_the_trainer_and_the_report_ask(task):
    totals = totals_of(task, task.held_out_batches(4), uniform(task))
    assert {task.loss_metric, task.score} <= task.scores(totals).keys()
    assert task.description.endswith(".")
    assert task.train_size > 0
    assert task.held_out_size > 0
    assert json.loads(json.dumps(task.model_fields)) == task.model_fields
    assert {"architecture", "causal"} <= task.model_fields.keys() <= {field.name for field in fields(ModelSpec)}
    assert len(task.data_hash) == 64
    int(task.data_hash, 16)


def test_a_training_batch_is_a_pure_function_of_its_indices(task):
    indices = torch.tensor([task.train_size - 1, 0, 3, 0])
    first, again = task.train_batch(indices), task.train_batch(indices)
    for name, column in first.items():
        column_again = again[name].clone()
        assert torch.equal(column, column_again)
        assert column.device.type == "cpu"
        assert torch.equal(column[1], column[3])
        assert torch.equal(column[2], task.train_batch(torch.tensor([3]))[name][0])
        column.zero_()  # what a caller does to a batch reaches no other
        assert torch.equal(task.train_batch(indices)[name], column_again)


def test_held_out_batches_hold_every_example_once_whatever_their_size(task):
    def joined(batch_size: int) -> torch.Tensor:
        batches = list(task.held_out_batches(batch_size))
        assert sum(len(batch["labels"]) for batch in batches) == task.held_out_size
        assert all(len(batch["labels"]) <= batch_size for batch in batches)
        return torch.cat([column.flatten() for name in batches[0] for batch in batches for column in (batch[name],)])

    assert torch.equal(joined(3), joined(1000))


def test_training_and_held_out_data_share_nothing(task):
    def rows(batch: dict[str, torch.Tensor]) -> set[bytes]:
        inputs = next(column for name, column in sorted(batch.items()) if name != "labels")
        return {row.numpy().tobytes() for row in inputs}

    train = rows(task.train_batch(torch.arange(task.train_size)))
    assert not train & set().union(*map(rows, task.held_out_batches(7)))


CROWDED = {
    "selective-copy": {"vocab_size": 5, "length": 9, "num_tokens": 2},
    "mad-selective-copying": {"vocab_size": 5, "length": 9, "num_tokens": 2},
    "relations": {"vocab_entities": 4, "vocab_relations": 2, "num_entities": 3, "num_relations": 1, "num_questions": 2},
    "multihop": {"vocab_entities": 4, "num_entities": 3, "num_questions": 2, "max_hops": 2},
    "mad-compression": {"vocab_size": 4, "length": 6},
    "mad-recall": {"vocab_size": 4, "length": 8},
    "mad-noisy-recall": {"vocab_size": 5, "noise_vocab_size": 1, "length": 8},
    "mad-fuzzy-recall": {"vocab_size": 5, "length": 12, "key_tokens": 1, "value_tokens": 1},
    "mad-memorization": {"vocab_size": 5, "length": 12},
    "recall": {"vocab_size": 8, "num_pairs": 2, "length": 8},
    "induction": {"vocab_size": 3, "length": 9, "num_triggers": 1},
    "reverse": {"length": 3},
    "state-tracking": {"group": "Z2", "length": 11},
    "capacity": {"dimension": 4, "num_patterns": 2, "num_values": 2, "num_cues": 1, "noise": 0.0},
}
"""Options that allow so few examples that drawn ones come again."""


@pytest.mark.parametrize("name", CROWDED)
def test_no_held_out_example_was_trained_on(name):
    task = load(name, **CROWDED[name], train_size=400, held_out_size=20)
    column = "signs" if name == "capacity" else "input_ids"
    held_out, train = ({row.numpy().tobytes() for row in part[column]} for part in (task.held_out, task.train))
    assert not held_out & train
    rows = torch.cat([task.train[column], task.held_out[column]]).flatten(1)
    assert len(rows.unique(dim=0)) < len(rows) or name == "state-tracking"  # it is crowded


def test_where_nearly_everything_is_held_out_a_sentence_says_so():
    with pytest.raises(TwofoldError, match="are still among those held out: hold fewer out, or allow"):
        load("reverse", length=1, train_size=400, held_out_size=200)


def test_the_same_options_give_the_same_data_in_another_process():
    code = (
        "import json, sys; from twofold.tasks import load_task; from twofold.task_spec import TaskSpec;"
        "print([load_task(TaskSpec(name=name, options=options)).data_hash for name, options in json.loads(sys.argv[1])])"
    )
    names = ("sort", "recall", "anomaly", "text")
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([(name, SMALL[name]) for name in names])],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert done.stdout.strip() == str([load(name).data_hash for name in names])


@pytest.mark.parametrize("name", [name for name in SMALL if name != "text"])
def test_another_data_seed_is_other_data(name):
    assert load(name, data_seed=1).data_hash != load(name).data_hash


def test_the_five_list_tasks_read_the_same_lists_and_have_their_own_hashes():
    tasks = [load(name) for name in ("reverse", "sort", "sub", "swap", "copy")]
    rows = torch.arange(LISTS["train_size"])
    assert all(
        torch.equal(task.train_batch(rows)["input_ids"], tasks[0].train_batch(rows)["input_ids"]) for task in tasks
    )
    assert len({task.data_hash for task in tasks}) == 5


# Sums


def uniform(task: Task):
    width = task.model_fields.get("num_labels") or task.model_fields["vocab_size"]
    return lambda batch: torch.zeros(*batch["labels"].shape, width)


def test_equal_logits_cost_log_n_whatever_the_batches(task):
    logits_of = uniform(task)
    width = logits_of(next(task.held_out_batches(1))).shape[-1]
    few, many = (totals_of(task, task.held_out_batches(size), logits_of) for size in (2, 1000))
    assert few == pytest.approx(many, rel=1e-12)
    assert few["count"] == sum(task.count(batch) for batch in task.held_out_batches(5))
    assert task.scores(few)["loss"] == pytest.approx(math.log(width), rel=1e-6)


def test_measure_is_the_models_own_loss(task):
    """loss sum / count = what the model returns for the batch; a step's count is the sum of its micro-batches' counts."""
    model, batch = small_model(task), task.train_batch(torch.arange(4))
    with torch.no_grad():
        output = model(**batch, num_items_in_batch=task.count(batch))
        halves = [task.train_batch(rows) for rows in torch.arange(4).split(2)]
        parts = [model(**half, num_items_in_batch=task.count(batch)).loss for half in halves]
    sums = task.measure(output.logits, batch)
    assert output.loss.item() == pytest.approx((sums["loss"] / sums["count"]).item(), rel=1e-5)
    assert sum(parts).item() == pytest.approx(output.loss.item(), rel=1e-5)


def test_measure_reads_half_precision_as_what_it_is(task):
    batch = next(task.held_out_batches(4))
    logits = torch.randn(uniform(task)(batch).shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    half, whole = task.measure(logits, batch), task.measure(logits.double(), batch)
    assert {name: value.item() for name, value in half.items()} == pytest.approx(
        {name: value.item() for name, value in whole.items()}, rel=1e-6
    )


def small_model(task: Task):
    spec = ModelSpec.from_dict(
        {
            "tie": "(Q, K=V)",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 16,
            **task.model_fields,
        }
    )
    return build_model(spec, seed=0)


def test_a_built_model_takes_every_batch_and_learns_from_it(task):
    model = small_model(task)
    for batch in (task.train_batch(torch.tensor([0, 2])), *task.held_out_batches(7)):
        model.zero_grad()
        model(**batch, num_items_in_batch=task.count(batch)).loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_tokens_per_example_is_what_the_model_computes(task):
    seen = []
    model = small_model(task)
    model.trunk.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape[1]))
    model(**task.train_batch(torch.tensor([0])))
    assert seen == [task.tokens_per_example]


def test_ignored_is_the_label_that_models_ignore():
    assert IGNORED == IGNORED_BY_MODELS


# Mistakes


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("revers", {}, "no task 'revers' (did you mean 'reverse'?)"),
        ("poetry", {}, "the tasks are reverse, sort, sub, swap, copy, recall, mqar, mad-recall, mad-noisy-recall, "),
        ("sort", {"lenght": 8}, "The task sort has no option 'lenght' (did you mean 'length'?); its options are length, train_size"),
        ("sort", {"colour": 8}, "its options are length, train_size, held_out_size, data_seed"),
        ("sort", {"length": "8"}, "length is '8', but it must be a whole number"),
        ("sort", {"length": True}, "length is True, but it must be a whole number"),
        ("sort", {"length": 8.0}, "length is 8.0, but it must be a whole number"),
        ("sort", {"length": 0}, "length is 0, but it must be at least 1"),
        ("sort", {"data_seed": -1}, "data_seed is -1, but it must be from 0 up to"),
        ("swap", {"length": 7}, "length is 7, but it must be even"),
        ("recall", {"length": 15}, "length is 15, but it must be even"),
        ("recall", {"length": 14}, "length is 14, but it must be at least 16, 4 for each of the 4 pairs"),
        ("recall", {"vocab_size": 9}, "vocab_size is 9, but it must be at least 10"),
        ("recall", {"power": 0}, "power is 0.0, but it must be more than 0"),
        ("recall", {"power": math.inf}, "power is inf, but it must be a finite number"),
        ("recall", {"random_fillers": 1}, "random_fillers is 1, but it must be true or false"),
        ("digits", {"patch_size": 3}, "patch_size is 3, but it must be 1, 2, 4 or 8"),
        ("digits", {"held_out_size": 1797}, "held_out_size is 1797, but it must be from 1 to 1796"),
        ("anomaly", {"set_size": 2}, "set_size is 2, but it must be at least 3"),
        ("anomaly", {"set_size": 80}, "class 0 has 36 held-out items, but a set of 80 takes 79 of one class"),
        ("anomaly", {"held_out_fraction": 1.0}, "held_out_fraction is 1.0, but it must be between 0 and 1"),
        ("images", {}, "Give exactly one of the options path and dataset; known data sets are mnist, fashion-mnist, cifar-10"),
        ("images", {"dataset": "mnist", "path": "x"}, "Give exactly one of the options path and dataset"),
        ("images", {"dataset": "mnist", "num_channels": 2}, "num_channels is 2, but it must be 1 (grey), 3 (colours)"),
        ("text", {"path": "x", "dataset": "y"}, "Give at most one of the options path and dataset"),
        ("text", {"context": 1}, "context is 1, but it must be at least 2"),
        ("text", {"field": "a,,b"}, "field is 'a,,b', but it must be the name of a field"),
        ("text", {"path": "nowhere.txt"}, "There is no file or folder nowhere.txt"),
        ("text", {"max_bytes": 100, "context": 1000}, "is too short: its training part has 101 bytes, and a chunk has 1,000"),
    ],
)  # fmt: skip
def test_a_mistake_gets_its_sentence(name, options, sentence):
    with pytest.raises(TwofoldError) as caught:
        load_task(TaskSpec(name=name, options=options))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@dataclass(frozen=True, kw_only=True)
class Sizes(Options):
    share: float = 0.5


def test_a_whole_number_is_a_number():
    assert read_options(Sizes, {"share": 2}, "any").share == 2.0
    with pytest.raises(TwofoldError, match="Task any: The option share is 'x'"):
        read_options(Sizes, {"share": "x"}, "any")


def test_a_missing_library_is_asked_for_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        TwofoldError,
        match=r'^scikit-learn is needed to read the handwritten digits, and is not installed: pip install "twofold\[data\]"\.$',
    ):
        load("digits")


def test_what_is_wrong_inside_a_library_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_library.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        data_library("broken_library", "test")


# Draws


@given(count=st.integers(1, 7), extra=st.integers(0, 9), seed=st.integers(0, 99))
def test_distinct_numbers_are_distinct_and_in_range(count, extra, seed):
    chosen = distinct(generator(seed, "test"), 20, count, count + extra)
    assert chosen.shape == (20, count)
    assert ((chosen >= 0) & (chosen < count + extra)).all()
    assert all(len(set(row)) == count for row in chosen.tolist())


def test_every_ordered_sample_is_equally_likely():
    rows = 12_000
    samples, counts = torch.from_numpy(distinct(generator(0, "test"), rows, 2, 4)).unique(dim=0, return_counts=True)
    assert len(samples) == 12
    assert ((counts - rows / 12).abs() < 5 * (rows / 12) ** 0.5).all()  # five standard deviations of each count


def test_the_data_of_a_seed_are_the_same_for_ever():
    assert load("sort").data_hash == "dbe98e53e4f99b81008a0846ab8e562f05717917900fa182854bc9837c1c7e90"
    assert load("recall").data_hash == "09b7d51e297d99f23c7aa719650c958847653be7c9ee4606b42e93484e1748f0"
    assert load("anomaly").data_hash == "4f818fa2b5ecb361e918d1cf828a969c34c304f2416571303643bd4439f1aa3c"


def test_documented_examples_run():
    outcome = doctest.testmod(twofold.tasks)
    assert outcome.attempted > 0
    assert outcome.failed == 0
