"""The worker: what it answers, and with real training a study that is killed with SIGKILL and resumed."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from study_fixture import PLAN, ask
from twofold.errors import TwofoldError
from twofold.spec import ModelSpec
from twofold.study import plan as plans
from twofold.study import worker
from twofold.study.plan import StudyPlan
from twofold.study.progress import StudyProgress
from twofold.study.record import StudyRecord
from twofold.study.results import Results
from twofold.study.runner import run_study
from twofold.task_spec import TaskSpec
from twofold.training.progress import Progress
from twofold.training.spec import RunSpec, TrainingSpec

RUN = RunSpec(
    task=TaskSpec(name="text", options={"context": 64}),
    model=ModelSpec.from_dict({**PLAN["model"], "vocab_size": 256}),
    training=TrainingSpec(**PLAN["training"]),
    seed=0,
)


# What it answers; nothing is trained


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the worker says."""
    monkeypatch.setattr(worker, "tasks", SimpleNamespace(load_task=lambda spec: SimpleNamespace(**asdict(ask(spec)))))
    worker._loaded.cache_clear()
    return []


def serve(told: list[dict[str, Any]], command: dict[str, Any]) -> dict[str, Any]:
    worker._serve(command, told.append)
    assert all(json.loads(json.dumps(values)) for values in told)
    return told[-1]


def run_command(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "command": "run",
        "run": RUN.to_dict(),
        "folder": str(folder),
        "data_hash": "d" * 64,
        "keep_model": True,
    } | changes


def training(monkeypatch: pytest.MonkeyPatch, train: Callable[..., object]) -> None:
    monkeypatch.setattr(worker, "trainer", SimpleNamespace(train=train))


def test_a_plan_is_expanded_or_refused(told: list[dict[str, Any]]):
    needed = ["bytes", "recall"]
    plan = StudyPlan.model_validate(PLAN).to_dict()
    answer = serve(told, {"command": "expand", "plan": plan, "needed": needed})
    assert answer["event"] == "expanded"
    assert set(answer["tasks"]) == {"bytes", "recall"}
    assert len(answer["entries"]) == 12
    wrong = StudyPlan.model_validate({**PLAN, "model": {**PLAN["model"], "num_key_value_heads": 3}}).to_dict()
    answer = serve(told, {"command": "expand", "plan": wrong, "needed": needed})
    assert answer["event"] == "refused"
    assert answer["error"].startswith("In task bytes, variant mha: ")


@pytest.mark.parametrize(("keep_model", "left"), [(True, {"model", "outcome.json"}), (False, {"outcome.json"})])
def test_a_run_leaves_its_outcome_and_its_model_where_that_is_wanted(
    told: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, keep_model: bool, left: set[str]
):
    def train(run: RunSpec, folder: Path, *, task: Any, report: Callable[[Progress], None]) -> None:
        assert (run, task.data_hash) == (RUN, "d" * 64)
        for name in ("model", "checkpoints"):
            (folder / name).mkdir()
        (folder / "outcome.json").write_text("{}")
        for step in range(50):
            report(
                Progress(step=step, steps=50, tokens=1, loss=1.0, seconds=1.0, tokens_per_second=1.0, seconds_left=1.0)
            )

    training(monkeypatch, train)
    assert serve(told, run_command(tmp_path, keep_model=keep_model)) == {"event": "done"}
    assert {path.name for path in tmp_path.iterdir()} == left
    assert [values["event"] for values in told] == ["progress", "done"], "progress is told seldom"


def raising(error: Exception) -> Callable[..., None]:
    def train(*_: object, **__: object) -> None:
        raise error

    return train


def test_a_failure_is_one_sentence(
    told: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    training(monkeypatch, raising(TwofoldError("The loss is NaN at step 7.")))
    assert serve(told, run_command(tmp_path)) == {"event": "failed", "error": "The loss is NaN at step 7."}
    assert capsys.readouterr().err == ""
    training(monkeypatch, raising(RuntimeError("CUDA error: something\nCompile with TORCH_USE_CUDA_DSA")))
    answer = serve(told, run_command(tmp_path))
    assert answer["event"] == "failed"
    assert answer["error"].startswith("RuntimeError: CUDA error: something (the worker's log")
    assert "Traceback" in capsys.readouterr().err
    training(monkeypatch, raising(AssertionError()))
    assert serve(told, run_command(tmp_path))["error"].startswith("AssertionError: no message (")


def test_data_that_changed_since_the_study_began_are_refused(
    told: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    training(monkeypatch, raising(ZeroDivisionError()))
    answer = serve(told, run_command(tmp_path, data_hash="0" * 64))
    assert answer["event"] == "failed"
    assert answer["error"].startswith("The data of task text are not those with which the study was begun (hash dddd")


def test_a_worker_ends_when_its_pipe_closes_even_before_it_is_ready():
    process = subprocess.Popen([sys.executable, "-P", "-m", "twofold.study.worker"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(20) == 0


# Real training

KILLED: dict[str, Any] = {
    "name": "killed",
    "title": "A study to be killed",
    "question": "Is anything run twice?",
    "reference": "mha",
    "seeds": [3],
    "model": {
        "tie": "(Q, K, V)", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32,
    },
    "training": {"steps": 10, "batch_size": 8, "learning_rate": 1e-3},
    "variants": [
        {"name": "mha"},
        {"name": "explodes", "model": {"tie": "(Q, K=V)", "initializer_range": 1e30}},
    ],
    "tasks": [
        {"name": "quick", "task": "reverse", "options": {"length": 4, "train_size": 64, "held_out_size": 16}},
        {
            "name": "slow",
            "task": "reverse",
            "variants": ["mha"],
            "options": {"length": 4, "train_size": 64, "held_out_size": 16},
            "training": {"steps": 900, "checkpoint_every": 60},
        },
    ],
}  # fmt: skip
RUNNER = """
import json, sys
from pathlib import Path
from twofold.study.plan import StudyPlan
from twofold.study.runner import run_study
run_study(StudyPlan.model_validate(json.loads(sys.argv[1])), Path(sys.argv[2]), command="test", workers=1)
"""


def test_a_study_that_is_killed_goes_on_from_its_checkpoints_and_repeats_nothing(tmp_path: Path):
    # With one seed the longest run comes first, and the kill meets it.
    study_plan = StudyPlan.model_validate(KILLED)
    process = subprocess.Popen([sys.executable, "-c", RUNNER, json.dumps(study_plan.to_dict()), str(tmp_path)])
    checkpoints = tmp_path / "runs/slow/mha/seed-3/checkpoints"
    wait_for(lambda: checkpoints.is_dir() and any(step >= 120 for step in steps_of(checkpoints)))
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in workers))
    assert dict(Results.load(tmp_path).runs.status.value_counts()) == {"pending": 3}
    reached = max(steps_of(checkpoints))

    told: list[StudyProgress] = []
    results = run_study(study_plan, tmp_path, command="test", workers=1, observe=told.append)
    first = next(
        run.progress for progress in told for run in progress.under_way if run.path.startswith("slow") and run.progress
    )
    assert first.step > reached
    status = {(row.task, row.variant): row.status for row in results.runs.itertuples()}
    assert status == {("quick", "mha"): "done", ("quick", "explodes"): "failed", ("slow", "mha"): "done"}
    failed = results.runs[results.runs.status == "failed"].iloc[0]
    assert "step 1" in failed.error
    done = results.runs[results.runs.status == "done"]
    assert (done["score:accuracy"] >= 0).all()
    assert math.isfinite(results.by_seed("slow", "mha", "loss")[3])
    steps = results.curves[(results.curves.task == "slow") & (results.curves.metric == "loss")].step
    assert steps.max() == 900
    record = StudyRecord.read(tmp_path)
    for planned in record.runs:
        folder = planned.folder(tmp_path)
        if (folder / "outcome.json").exists():
            outcome = json.loads((folder / "outcome.json").read_text())
            assert outcome["parameters"] == planned.entry.parameters
            assert outcome["cached_floats_per_token"] == planned.entry.cached_floats_per_token
            assert outcome["data_hash"] == planned.entry.data_hash
            assert not (folder / "checkpoints").exists()


def steps_of(checkpoints: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*")]


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.long
def test_smoke_runs_in_a_minute_whatever_happens_in_the_middle(tmp_path: Path):
    smoke = plans.builtin("smoke")
    began = time.monotonic()
    results = run_study(smoke, tmp_path / "whole", command="test")
    seconds = time.monotonic() - began
    assert set(results.runs.status) == {"done"}
    assert seconds < 60 * max(1.0, 2 / (os.cpu_count() or 1))
    process = subprocess.Popen([sys.executable, "-c", RUNNER, json.dumps(smoke.to_dict()), str(tmp_path / "killed")])
    wait_for(lambda: len(list((tmp_path / "killed").glob("runs/*/*/*/outcome.json"))) >= 5)
    process.kill()
    process.wait()
    again = run_study(smoke, tmp_path / "killed", command="test")
    columns = [name for name in results.runs.columns if name.startswith("score:")]
    assert again.runs[columns].equals(results.runs[columns]), "a kill must change no number"
