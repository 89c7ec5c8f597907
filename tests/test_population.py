"""A population: every run of it is the run alone, in float64 to rounding, whatever else is trained beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from task_fixture import SMALL, load
from training_fixture import MODEL, Progressions, make_run
from twofold import rotations
from twofold.errors import TwofoldError
from twofold.lock import FolderLock
from twofold.models import build_model
from twofold.spec import ModelSpec
from twofold.task_spec import TaskSpec
from twofold.tasks import Task, load_task
from twofold.training.alike import MAX_MODELS, models_in, shape_of
from twofold.training.checkpoint import Checkpoints
from twofold.training.evaluation import evaluate
from twofold.training.optimizer import adamw
from twofold.training.population import train_population
from twofold.training.spec import RunSpec, TrainingSpec
from twofold.training.stacked import Machine, Stack
from twofold.training.trainer import Outcome, train

# Where a gradient is zero but for rounding, as that of the bias of keys, Adam divides by its epsilon of 1e-8 and makes some 1e-11 of what is left.
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def _single(_double: None) -> None:
    torch.set_default_dtype(torch.float32)


def steady(**changes: Any) -> RunSpec:
    return make_run(**{**changes, "model": {"dropout": 0.0, **changes.get("model", {})}})


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_same_folder(ours: Path, theirs: Path) -> None:
    """All that a run leaves, but for the seconds that it took."""
    names = sorted(path.relative_to(theirs).as_posix() for path in theirs.rglob("*"))
    assert sorted(path.relative_to(ours).as_posix() for path in ours.rglob("*")) == names
    assert len(lines(ours)) == len(lines(theirs))
    for mine, other in zip(lines(ours), lines(theirs), strict=True):
        assert list(mine) == list(other)
        assert mine.pop("split") == other.pop("split")
        mine.pop("seconds"), other.pop("seconds")
        assert mine == pytest.approx(other, rel=1e-9, abs=1e-11)
    for name in names:
        if name.endswith(".safetensors"):
            mine, other = load_file(ours / name), load_file(theirs / name)
            assert mine.keys() == other.keys()
            for key in mine:
                torch.testing.assert_close(mine[key], other[key], **CLOSE)
        elif name.endswith(".json"):
            mine, other = (json.loads((folder / name).read_text()) for folder in (ours, theirs))
            assert mine.keys() == other.keys()
            for key in mine.keys() - {"seconds"}:
                assert (
                    mine[key] == pytest.approx(other[key], rel=1e-9, abs=1e-11)
                    if key in ("losses", "scores")
                    else mine[key] == other[key]
                )


def check_same_as_alone(runs: list[RunSpec], folder: Path, task: Task) -> list[Any]:
    together = train_population(runs, [folder / f"together-{n}" for n in range(len(runs))], task=task)
    for number, (run, ending) in enumerate(zip(runs, together, strict=True)):
        assert isinstance(ending, Outcome)
        alone = train(run, folder / f"alone-{number}", task=task)
        assert ending.scores == pytest.approx(alone.scores, rel=1e-9)
        check_same_folder(folder / f"together-{number}", folder / f"alone-{number}")
    return together


def test_each_run_of_a_population_is_the_run_alone(tmp_path: Path):
    cadence = {"steps": 7, "evaluate_every": 3, "checkpoint_every": 2, "accumulation_steps": 2}
    runs = [
        steady(seed=3, **cadence),
        steady(seed=3, learning_rate=3e-2, warmup_steps=3, clip_norm=0.05, **cadence),
        steady(seed=4, model={"tie": "V = 2Q - K"}, weight_decay=0.7, betas=(0.8, 0.99), **cadence),
        steady(seed=5, model={"tie": "2V = -3K", "initializer_range": 0.3}, schedule="constant_with_decay", clip_norm=0.0, **cadence),
    ]  # fmt: skip
    check_same_as_alone(runs, tmp_path, Progressions())


# What differs and what is shared


TASKS: dict[str, tuple[TaskSpec, dict[str, Any]]] = {
    "reverse": (TaskSpec(name="reverse", options={"length": 5, "train_size": 24, "held_out_size": 7}), {}),
    "text": (
        TaskSpec(name="text", options={"context": 11, "max_bytes": 3_000, "held_out_bytes": 99}),
        {"positions": {"kind": "rotary"}, "window_tokens": [4, 0], "qk_norm": True},
    ),
    "recall": (
        TaskSpec(name="recall", options={"vocab_size": 12, "num_pairs": 2, "length": 10, "train_size": 24, "held_out_size": 7}),
        {"positions": {"kind": "relative_bias", "num_buckets": 8, "max_distance": 9}, "tie_word_embeddings": False},
    ),
}  # fmt: skip
LOADED = {name: load_task(spec) for name, (spec, _) in TASKS.items()}
TIES = ("(Q, K=V)", "V = Q - K", "2V = -3K", "V = 2Q + K", "(Q=V, K)")


@st.composite
def populations(draw: st.DrawFn) -> tuple[str, list[RunSpec]]:
    """One to five runs on a task; their ties have two free projections, of queries and keys."""
    name = draw(st.sampled_from(sorted(TASKS)))
    spec, changes = TASKS[name]
    shared = {"steps": 3, "batch_size": 4, "log_every": 1, "accumulation_steps": draw(st.sampled_from([1, 2]))}

    def run() -> RunSpec:
        tie = draw(st.sampled_from(TIES))
        model = {"dropout": 0.0, "tie": tie, "hidden_size": 8, "head_dim": 6, "intermediate_size": 11}
        return RunSpec(
            task=spec,
            model=ModelSpec.from_dict({**MODEL, "vocab_size": 0, **LOADED[name].model_fields, **model, **changes}),
            training=TrainingSpec(
                learning_rate=draw(st.sampled_from([1e-3, 1e-2, 0.1])),
                warmup_steps=draw(st.integers(0, 3)),
                schedule=draw(st.sampled_from(["cosine", "constant_with_decay"])),
                clip_norm=draw(st.sampled_from([0.0, 0.02, 1.0])),
                weight_decay=draw(st.sampled_from([0.0, 0.1, 2.0])),
                betas=draw(st.sampled_from([(0.9, 0.95), (0.5, 0.999)])),
                **shared,
            ),
            seed=draw(st.integers(0, 2)),
        )

    return name, [run() for _ in range(draw(st.integers(1, 5)))]


@given(populations())
@settings(max_examples=6, deadline=None, phases=[Phase.generate])
def test_any_population_is_its_runs(drawn: tuple[str, list[RunSpec]]):
    name, runs = drawn
    with TemporaryDirectory() as folder:
        check_same_as_alone(runs, Path(folder), LOADED[name])


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"digits", "anomaly", "capacity"}))
def test_every_task_is_measured_for_each_model(name: str):
    """Those whose inputs are float32 are left to the test below."""
    task = load(name)
    fields = {**MODEL, "vocab_size": 0, **task.model_fields, "dropout": 0.0}
    spec = ModelSpec.from_dict({**fields, "positions": {"kind": "none"}})
    training = TrainingSpec(steps=1, batch_size=4, learning_rate=1e-3)
    runs = [RunSpec(task=TaskSpec(name=name), model=spec, training=training, seed=seed) for seed in range(3)]
    models = [build_model(spec, seed=seed) for seed in range(3)]
    stack = Stack(runs, models, task, Machine(torch.device("cpu")))
    stack.load(models, [adamw(model, training) for model in models])
    for model, scores in zip(models, stack.evaluate(4), strict=True):
        assert scores == pytest.approx(evaluate(model, task, batch_size=4), rel=1e-9)


# Interruptions and failures


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def folders(place: Path, runs: list[RunSpec]) -> list[Path]:
    return [place / str(number) for number in range(len(runs))]


def interrupted(
    patch: pytest.MonkeyPatch, at: int, runs: list[RunSpec], place: Path, error: type[BaseException] = KeyboardInterrupt
) -> None:
    """Train until step ``at``, which is never taken."""
    take = Stack.take

    def until(stack: Stack, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if step == at:
            raise error
        return take(stack, step)

    with patch.context() as patched:
        patched.setattr(Stack, "take", until)
        with pytest.raises(error):
            train_population(runs, folders(place, runs), task=Progressions())


SAVING: dict[str, Any] = {"steps": 6, "checkpoint_every": 2, "evaluate_every": 3, "log_every": 5}


def saving_runs() -> list[RunSpec]:
    return [steady(seed=seed, model={"tie": tie}, **SAVING) for seed, tie in enumerate(TIES[:3])]


def test_a_population_that_was_interrupted_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs, task = saving_runs(), Progressions()
    whole = train_population(runs, folders(tmp_path / "whole", runs), task=task)
    interrupted(monkeypatch, 6, runs, tmp_path / "cut")
    assert not any((folder / "outcome.json").exists() for folder in folders(tmp_path / "cut", runs))
    resumed = train_population(runs, folders(tmp_path / "cut", runs), task=task)
    for one, other in zip(whole, resumed, strict=True):
        assert isinstance(one, Outcome)
        assert isinstance(other, Outcome)
        assert one.scores == other.scores
    for ours, theirs in zip(folders(tmp_path / "cut", runs), folders(tmp_path / "whole", runs), strict=True):
        check_same_folder(ours, theirs)
        mine, other = weights(ours), weights(theirs)
        assert all(torch.equal(mine[name], other[name]) for name in other)
    # What has ended is read.
    monkeypatch.setattr(Stack, "take", None)
    assert train_population(runs, folders(tmp_path / "cut", runs), task=task) == resumed


def test_runs_go_on_alone_or_together_from_wherever_each_of_them_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    runs, task = saving_runs(), Progressions()
    places = folders(tmp_path / "mixed", runs)
    interrupted(monkeypatch, 3, runs, tmp_path / "mixed")
    # One goes on alone to its end, one is a checkpoint ahead of the other.
    train(runs[0], places[0], task=task)
    shutil.rmtree(places[1])
    interrupted(monkeypatch, 5, [runs[1]], tmp_path / "ahead")
    (tmp_path / "ahead" / "0").rename(places[1])
    told: list[int] = []
    train_population(runs, places, task=task, report=lambda progress: told.append(progress.step))
    assert told == [3, 5, 6]
    for number, run in enumerate(runs):
        train(run, tmp_path / f"alone-{number}", task=task)
        check_same_folder(places[number], tmp_path / f"alone-{number}")


def test_a_run_that_fails_fails_alone(tmp_path: Path):
    task = Progressions()
    runs = [
        steady(seed=0, checkpoint_every=2, log_every=1),
        steady(seed=1, checkpoint_every=2, log_every=1, model={"initializer_range": 1e200}),
        steady(seed=2, checkpoint_every=2, log_every=1, learning_rate=1e-3),
        steady(seed=3, checkpoint_every=2, log_every=1),
    ]
    places = folders(tmp_path / "together", runs)
    places[3].mkdir(parents=True)
    (places[3] / "metrics.jsonl").touch()
    good, diverged, other, taken = train_population(runs, places, task=task)
    with pytest.raises(TwofoldError) as alone:
        train(runs[1], tmp_path / "diverged", task=task)
    assert str(diverged) == str(alone.value)
    assert "step 1, on the batch of places 0 to 7" in str(diverged)
    assert isinstance(taken, TwofoldError)
    assert "holds metrics.jsonl but no run.json" in str(taken)
    assert not list((places[1] / "checkpoints").glob("*"))
    assert lines(places[1]) == []
    for number, ending in ((0, good), (2, other)):
        assert isinstance(ending, Outcome)
        train(runs[number], tmp_path / f"alone-{number}", task=task)
        check_same_folder(places[number], tmp_path / f"alone-{number}")
    # Once more: those that are done are read, the other fails again.
    again = train_population(runs[:3], places[:3], task=task)
    assert again[0] == good
    assert str(again[1]) == str(diverged)
    with FolderLock(places[2]):
        assert train_population([runs[2]], [places[2]], task=task) == [other]


def test_a_folder_that_is_in_use_or_full_is_one_runs_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = saving_runs()
    places = folders(tmp_path, runs)
    save = Checkpoints.save

    def full(self: Checkpoints, *given: Any) -> None:
        if self.folder.parent == places[1]:
            raise TwofoldError("No room.")
        save(self, *given)

    monkeypatch.setattr(Checkpoints, "save", full)
    with FolderLock(places[0]):
        in_use, no_room, good = train_population(runs, places, task=Progressions())
    assert "is being run by" in str(in_use)
    assert str(no_room) == "No room."
    assert isinstance(good, Outcome)


def test_where_memory_ends_halves_are_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    runs, task = [steady(seed=seed, steps=4, checkpoint_every=2) for seed in range(5)], Progressions()
    take, sizes = Stack.take, []

    def small(stack: Stack, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(stack.runs))
        if len(stack.runs) > 2 and step > 2:
            raise torch.OutOfMemoryError
        return take(stack, step)

    monkeypatch.setattr(Stack, "take", small)
    endings = train_population(runs, folders(tmp_path, runs), task=task)
    assert sizes == [5, 5, 5, 2, 2, 3, 1, 1, 2, 2], "all go on from the checkpoints of step 2"
    assert "5 models need more memory than there is: they are trained as 2 and 3." in caplog.text
    for number, run in enumerate(runs):
        assert isinstance(endings[number], Outcome)
        train(run, tmp_path / f"alone-{number}", task=task)
        check_same_folder(tmp_path / str(number), tmp_path / f"alone-{number}")

    def never(stack: Stack, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Stack, "take", never)
    endings = train_population(runs[:2], folders(tmp_path / "never", runs[:2]), task=task)
    assert all("One model is too much" in str(ending) for ending in endings)


# Which runs are alike


def test_runs_that_are_not_alike_are_refused(tmp_path: Path):
    def refused(*runs: RunSpec) -> str:
        with pytest.raises(TwofoldError) as error:
            train_population(runs, folders(tmp_path, list(runs)), task=Progressions())
        return str(error.value)

    one = steady()
    for other in (
        steady(steps=9),
        steady(model={"tie": "(Q, K, V)"}),
        steady(model={"tie": "(Q=K, V)"}),
        steady(batch_size=4),
    ):
        assert "not of one shape" in refused(one, other)
    assert "dropout draws" in refused(make_run())
    assert "loss scale" in refused(steady(precision="fp16"))
    with pytest.raises(TwofoldError, match="have one folder"):
        train_population([one, steady(seed=1)], [tmp_path, tmp_path], task=Progressions())
    assert train_population([], []) == []
    assert not list(tmp_path.iterdir())


def test_ties_that_code_tells_apart_are_of_different_shapes():
    def shape(tie: str, **model: Any) -> str:
        return shape_of(steady(model={"tie": tie, **model}))

    assert shape("(Q, K=V)") == shape("V = Q + 2K") != shape("(Q=K, V)")
    assert shape("(Q, K=V)", latent_dim=0) == shape("(Q, K=V)")
    stream = {"positions": {"kind": "rotary", "rotate": "stream"}}
    assert shape("(Q, K=V)", **stream) != shape("V = 2K", **stream)
    shared = {"positions": {"kind": "shared_rotary", "dim": 4, "key_dim": 4}}
    assert shape("(Q, K=V)", **shared) != shape("V = 2K", **shared)
    pattern = shape("(Q, K=V) | (Q, K, V)")
    assert pattern == shape("V = 2K | (Q, K, V)") != shape("(Q, K, V) | V = 2K")


def test_a_population_is_sized_by_memory():
    run = steady()
    one = next(size for size in range(1, 2**30, 2**10) if models_in(size, run, 12) == 2)
    assert models_in(0, run, 12) == 1
    assert models_in(10 * one, run, 12) in (19, 20)
    assert models_in(2**50, run, 12) == MAX_MODELS
    assert models_in(10 * one, run, 24) < 12
    assert models_in(10 * one, steady(accumulation_steps=2), 12) > 20


# Precision and compilation


@pytest.mark.usefixtures("_single")
def test_in_bf16_a_population_is_its_runs_to_the_precision_of_bf16(tmp_path: Path):
    runs, task = [steady(seed=seed, steps=3, precision="bf16") for seed in range(2)], Progressions()
    for number, ending in enumerate(train_population(runs, folders(tmp_path, runs), task=task)):
        assert isinstance(ending, Outcome)
        alone = train(runs[number], tmp_path / f"alone-{number}", task=task)
        assert ending.scores["loss"] == pytest.approx(alone.scores["loss"], rel=2e-3)


@pytest.mark.usefixtures("_single")
@pytest.mark.parametrize("name", ["anomaly", "capacity"])
def test_sets_of_floats_are_read(name: str, tmp_path: Path):
    task = load(name)
    spec = ModelSpec.from_dict(
        {**MODEL, "vocab_size": 0, **task.model_fields, "dropout": 0.0, "positions": {"kind": "none"}}
    )
    training = TrainingSpec(steps=2, batch_size=4, learning_rate=1e-3)
    runs = [RunSpec(task=TaskSpec(name=name), model=spec, training=training, seed=seed) for seed in range(2)]
    for number, ending in enumerate(train_population(runs, folders(tmp_path, runs), task=task)):
        assert isinstance(ending, Outcome)
        alone = train(runs[number], tmp_path / f"alone-{number}", task=task)
        assert ending.scores == pytest.approx(alone.scores, rel=1e-4)


def test_mapping_leaves_nothing_behind_in_the_tables_of_positions(tmp_path: Path):
    rotations._TABLES.clear()
    train_population(
        [steady(seed=seed, steps=1) for seed in range(2)], [tmp_path / "0", tmp_path / "1"], task=Progressions()
    )
    assert rotations._TABLES
    assert not any(
        torch._C._functorch.is_functorch_wrapped_tensor(table.cosine) for table in rotations._TABLES.values()
    )


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_population_is_the_same(tmp_path: Path):
    runs = [
        steady(seed=seed, model={"tie": tie}, steps=4, log_every=1, accumulation_steps=2)
        for seed, tie in enumerate(TIES[:3])
    ]
    for compiles in (False, True):
        train_population(runs, folders(tmp_path / str(compiles), runs), task=Progressions(), compile_model=compiles)
    for ours, theirs in zip(folders(tmp_path / "True", runs), folders(tmp_path / "False", runs), strict=True):
        check_same_folder(ours, theirs)
