"""The parts of the trainer: order, schedule, optimiser, one step, evaluation, files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from training_fixture import MODEL, Progressions, make_run
from twofold.errors import TwofoldError
from twofold.models import build_model
from twofold.spec import ModelSpec
from twofold.storage import new_folder, write_text
from twofold.training.acceleration import accelerator_of
from twofold.training.evaluation import evaluate
from twofold.training.metrics import MetricsLog
from twofold.training.optimizer import adamw, decaying_names, optimizer_tensors, restore_optimizer
from twofold.training.order import DataOrder
from twofold.training.progress import Outcome
from twofold.training.schedule import learning_rate
from twofold.training.spec import TrainingSpec
from twofold.training.step import Stepper


def stepper_of(run, task=None, dtype=torch.float32):
    model = build_model(run.model, seed=run.seed).to(dtype)
    return Stepper(run, model, task or Progressions(), accelerator_of(run.training), compile_model=False)


# Order


@given(train_size=st.integers(1, 50), batch_size=st.integers(1, 70), seed=st.integers(0, 9), epochs=st.integers(1, 4))
def test_every_epoch_holds_every_example_once(train_size, batch_size, seed, epochs):
    order = DataOrder(seed=seed, train_size=train_size, batch_size=batch_size)
    batches = [order.batch(number) for number in range(math.ceil(epochs * train_size / batch_size))]
    assert {len(batch) for batch in batches} == {batch_size}
    stream = torch.cat(batches)
    for epoch in range(epochs):
        assert sorted(stream[epoch * train_size : (epoch + 1) * train_size].tolist()) == list(range(train_size))


@given(number=st.integers(0, 100), others=st.lists(st.integers(0, 100), max_size=5))
def test_a_batch_depends_on_its_number_alone(number, others):
    fresh, used = (DataOrder(seed=3, train_size=29, batch_size=7) for _ in range(2))
    for other in others:
        used.batch(other)
    assert torch.equal(fresh.batch(number), used.batch(number))


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = [DataOrder(seed=seed, train_size=64, batch_size=64).batch(epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order.tolist()) for order in orders}) == 4


def test_all_ties_see_the_same_batches():
    ties = ("(Q, K, V)", "(Q, K=V)", "(Q=K=V)", "V = Q - K")
    steppers = [stepper_of(make_run(seed=5, model={"tie": tie})) for tie in ties]
    for step in (1, 6, 11):
        first, *others = [stepper.parts(step)[0]["input_ids"] for stepper in steppers]
        assert all(torch.equal(first, other) for other in others)


def test_no_data_is_told():
    with pytest.raises(TwofoldError, match="no training example"):
        DataOrder(seed=0, train_size=0, batch_size=1)


# Schedule


def test_cosine_by_its_formula():
    spec = TrainingSpec(steps=110, batch_size=1, learning_rate=2.0, warmup_steps=10, min_learning_rate_ratio=0.1)
    rates = [learning_rate(spec, step) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[10] == 2.0
    assert rates[60] == pytest.approx((2.0 + 0.2) / 2)
    assert rates[10:] == pytest.approx([0.2 + 1.8 * (1 + math.cos(math.pi * i / 100)) / 2 for i in range(100)])


def test_constant_with_decay_by_its_formula():
    spec = TrainingSpec(
        steps=100, batch_size=1, learning_rate=1.0, warmup_steps=4, schedule="constant_with_decay", decay_fraction=0.2
    )
    rates = [learning_rate(spec, step) for step in range(1, 101)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(rates[4:81]) == {1.0}
    assert rates[80:] == pytest.approx([1 - 0.9 * i / 20 for i in range(20)])


@given(
    steps=st.integers(1, 60),
    warmup=st.integers(0, 70),
    schedule=st.sampled_from(["cosine", "constant_with_decay"]),
    floor=st.floats(0, 1),
    decay=st.floats(0, 1),
)
def test_rates_rise_then_fall_and_are_never_zero(steps, warmup, schedule, floor, decay):
    spec = TrainingSpec(
        steps=steps, batch_size=1, learning_rate=1.0, warmup_steps=warmup, schedule=schedule,
        min_learning_rate_ratio=floor, decay_fraction=decay,
    )  # fmt: skip
    rates = [learning_rate(spec, step) for step in range(1, steps + 1)]
    top = min(warmup, steps)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert all(0 < rate <= 1.0 for rate in rates)
    assert all(rate >= floor for rate in rates[top:])


# Optimiser


def test_only_matrices_decay():
    fields = {"norm": "layernorm", "use_bias": True, "qk_norm": True}
    model = build_model(ModelSpec.from_dict(MODEL | fields | {"positions": {"kind": "relative_bias"}}), seed=0)
    shapes = {name: parameter.ndim for name, parameter in model.named_parameters()}
    decaying = decaying_names(model)
    assert {name.split(".")[-2] for name in decaying} == {"q_proj", "k_proj", "o_proj", "up_proj", "down_proj"}
    assert all(shapes[name] == 2 for name in decaying)
    # Two dimensions do not make a matrix: tables do not decay.
    assert {name.split(".")[-1] for name in shapes.keys() - decaying if shapes[name] == 2} == {
        "weight", "relative_bias",
    }  # fmt: skip
    assert "embedding.tokens.weight" not in decaying


def test_a_head_of_its_own_decays_and_so_do_patches():
    model = build_model(ModelSpec.from_dict(MODEL | {"tie_word_embeddings": False}), seed=0)
    assert "lm_head.weight" in decaying_names(model)
    images = {
        "architecture": "image_classification", "image_size": 4, "patch_size": 2, "num_channels": 3, "num_labels": 2,
        "vocab_size": 0, "causal": False, "positions": {"kind": "none"},
    }  # fmt: skip
    decaying = decaying_names(build_model(ModelSpec.from_dict(MODEL | images), seed=0))
    assert "patches.patches.weight" in decaying
    assert "patches.class_token" not in decaying


def test_groups_hold_every_parameter_once():
    model = build_model(ModelSpec.from_dict(MODEL), seed=0)
    optimizer = adamw(model, make_run(weight_decay=0.3).training)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len({id(parameter) for parameter in held}) == len(list(model.parameters()))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert all(group["fused"] for group in optimizer.param_groups)


def test_weight_decay_shrinks_what_has_no_gradient():
    run = make_run(weight_decay=0.5, learning_rate=0.1)
    model = build_model(run.model, seed=0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adamw(model, run.training).step()
    decaying = decaying_names(model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name] * (0.95 if name in decaying else 1.0))


def test_the_optimizer_comes_back_whole():
    stepper = stepper_of(make_run())
    for step in (1, 2):
        stepper.take(step)
    model = stepper._module.model
    tensors = optimizer_tensors(model, stepper.optimizer)
    assert len(tensors) == 3 * len(stepper.parameters)
    other = build_model(make_run().model, seed=9)
    optimizer = adamw(other, make_run().training)
    restore_optimizer(other, optimizer, tensors)
    again = optimizer_tensors(other, optimizer)
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert all(tensors[name].data_ptr() != again[name].data_ptr() for name in tensors)


# A step


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_batch_in_parts_is_the_whole_batch(parts):
    """In float64, so that only a wrong weight of a part can show."""
    model = {"dropout": 0.0}
    whole, split = (stepper_of(make_run(accumulation_steps=n, model=model), dtype=torch.float64) for n in (1, parts))
    counts = {whole.task.count(part) for part in split.parts(1)}
    assert len(counts) > 1  # else equal weights would do
    for step in (1, 2, 3):
        (loss, norm), (split_loss, split_norm) = whole.take(step), split.take(step)
        torch.testing.assert_close(split_loss, loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(split_norm, norm, rtol=1e-10, atol=0)
    for one, other in zip(whole.parameters, split.parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_the_loss_of_a_step_is_that_of_its_predictions():
    run = make_run(accumulation_steps=4, model={"dropout": 0.0})
    stepper = stepper_of(run)
    model = build_model(run.model, seed=run.seed)
    wanted = model(**stepper.task.train_batch(stepper.order.batch(0))).loss
    torch.testing.assert_close(stepper.take(1)[0], wanted.detach())


def test_gradients_are_clipped_only_where_asked():
    losses = {}
    for clip_norm in (0.0, 1e9, 1e-3):
        stepper = stepper_of(make_run(clip_norm=clip_norm, model={"dropout": 0.0}))
        optimizer, seen = stepper.optimizer, []
        optimizer.register_step_pre_hook(lambda o, *_: seen.append(grad_norm(o)))  # noqa: B023
        _, norm = stepper.take(1)
        losses[clip_norm] = (float(norm), *seen)
    assert losses[0.0] == losses[1e9]
    assert losses[0.0][0] == pytest.approx(losses[0.0][1])
    assert losses[1e-3][0] == losses[0.0][0]
    assert losses[1e-3][1] == pytest.approx(1e-3, rel=1e-3)


def grad_norm(optimizer):
    return float(nn.utils.get_total_norm([p.grad for group in optimizer.param_groups for p in group["params"]]))


def test_dropout_of_a_step_is_drawn_from_its_number():
    run = make_run(model={"dropout": 0.5})
    losses = []
    for disturb in (False, True):
        stepper = stepper_of(run)
        torch.manual_seed(99 if disturb else 1)
        losses.append(float(stepper.take(3)[0]))
    assert losses[0] == losses[1]
    assert losses[0] != float(stepper_of(make_run(seed=0, model={"dropout": 0.4})).take(3)[0])


def test_bf16_computes_in_bf16_and_keeps_float32_weights():
    run = make_run(precision="bf16", model={"dropout": 0.0})
    stepper = stepper_of(run)
    loss, _ = stepper.take(1)
    exact, _ = stepper_of(make_run(model={"dropout": 0.0})).take(1)
    assert loss.dtype == torch.float32
    assert 0 < abs(float(loss - exact)) < 0.05
    assert {parameter.dtype for parameter in stepper.parameters} == {torch.float32}


def test_fp16_on_a_cpu_is_told():
    if torch.cuda.is_available():
        pytest.skip("fp16 works here")
    with pytest.raises(TwofoldError, match=r"fp16 needs a graphics processor.*use bf16 or no"):
        accelerator_of(make_run(precision="fp16").training)


def test_a_batch_that_does_not_split_over_the_processes_is_told(monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    with pytest.raises(
        TwofoldError, match=r"4 examples \(batch_size / accumulation_steps\) do not split over 3 processes"
    ):
        accelerator_of(make_run(accumulation_steps=2).training)


# Evaluation


class Uneven(Progressions):
    """Batches of one and of many."""

    def held_out_batches(self, batch_size):
        for indices in torch.arange(self.held_out_size).split([1, self.held_out_size - 1]):
            yield self.train_batch(indices)


def test_scores_do_not_depend_on_the_batches():
    model = build_model(make_run().model, seed=0)
    scores = [evaluate(model, task, batch_size=n) for task, n in ((Progressions(), 1), (Progressions(), 7))]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
    batch = next(iter(Progressions().held_out_batches(10)))
    wanted = model.eval()(**batch).loss.detach()
    assert scores[0]["loss"] == pytest.approx(float(wanted), rel=1e-5)
    uneven = evaluate(model, Uneven(train_size=0), batch_size=3)
    assert uneven == pytest.approx(evaluate(model, Progressions(train_size=0), batch_size=10), rel=1e-6)


def test_evaluation_leaves_the_model_as_it_was():
    model = build_model(make_run().model, seed=0)
    before = torch.random.get_rng_state()
    first = evaluate(model, Progressions(), batch_size=4)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), before)
    assert evaluate(model.eval(), Progressions(), batch_size=4) == first
    assert not model.training


def test_nothing_held_out_is_told():
    with pytest.raises(TwofoldError, match="holds no data out"):
        evaluate(build_model(make_run().model, seed=0), Progressions(held_out_size=0), batch_size=4)


# Files


def test_the_log_is_cut_where_the_run_stands(tmp_path):
    write = {"tokens": 1, "seconds": 0.5, "split": "train"}
    with MetricsLog(tmp_path, step=0, tensorboard=False) as log:
        for step in (1, 2, 3):
            log.write(step=step, values={"loss": float(step)}, **write)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tok')
    with MetricsLog(tmp_path, step=2, tensorboard=False) as log:
        log.write(step=3, values={"loss": math.inf}, **write)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, None)]


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    target = tmp_path / "folder"
    with pytest.raises(KeyError), new_folder(target) as partial:
        (partial / "a").write_text("half")
        raise KeyError
    assert not list(tmp_path.iterdir())
    for text in ("one", "two"):
        with new_folder(target) as partial:
            (partial / "a").write_text(text)
            assert not target.exists() or (target / "a").read_text() == "one"
        assert (target / "a").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_file_that_cannot_be_written_stays(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_outcome_is_a_value():
    outcome = Outcome(
        scores={"loss": 0.1}, parameters=3, seconds=0.25, tokens=8, cached_floats_per_token=2, data_hash="d"
    )
    assert Outcome.from_dict(json.loads(json.dumps(outcome.to_dict()))) == outcome
    with pytest.raises(KeyError):
        Outcome.from_dict({"scores": {}})


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("steps", 2.5, "a whole number of at least 1"),
        ("steps", True, "a whole number of at least 1"),
        ("batch_size", "8", "a whole number of at least 1"),
        ("warmup_steps", -1, "a whole number of 0 or more"),
        ("learning_rate", "fast", "a number"),
        ("learning_rate", float("nan"), "a positive number"),
        ("betas", 0.9, "two numbers"),
        ("betas", (0.9, 1.0), "two numbers from 0 up to 1"),
    ],
)
def test_a_training_of_the_wrong_kind_is_told_so(field, value, wanted):
    fields = {"steps": 2, "batch_size": 2, "learning_rate": 1e-3, field: value}
    with pytest.raises(TwofoldError, match=f"{field} is .*{wanted}"):
        TrainingSpec(**fields)
