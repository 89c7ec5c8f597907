"""Studies whose alike runs train as one program: what is handed out, what befalls it, and that results are those of the runs alone."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import study_fixture
from small_study import STUDY
from study_fixture import PLAN
from twofold.errors import TwofoldError
from twofold.study import pool, runner, worker
from twofold.study.expansion import TaskAnswer, expand
from twofold.study.handouts import Handouts
from twofold.study.plan import StudyPlan, parse_plan
from twofold.study.progress import StudyProgress
from twofold.study.record import PlannedRun, StudyRecord
from twofold.study.results import Results
from twofold.study.runner import run_study
from twofold.task_spec import TaskSpec
from twofold.training.alike import models_in

WORKER = (sys.executable, str(Path(__file__).with_name("study_worker.py")))


@pytest.fixture
def _fake_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "COMMAND", WORKER)
    monkeypatch.setattr(runner, "graphics_processors", lambda: 1)
    monkeypatch.setenv("STUDY_WORKER_DEVICE", "NVIDIA X")
    monkeypatch.setenv("STUDY_WORKER_MEMORY", str(2**40))


def plan(*variants: str, **changes: Any) -> StudyPlan:
    """One task, the reference and ``variants`` of (Q, K=V), three seeds."""
    tied = [{"name": name, "model": {"tie": "(Q, K=V)"}} for name in variants]
    chosen = [{"name": "mha", "label": "(Q, K, V)"}, *tied]
    return StudyPlan.model_validate({**PLAN, "variants": chosen, "tasks": [PLAN["tasks"][0]], **changes})


def run(study_plan: StudyPlan, folder: Path, **options: Any) -> Results:
    return run_study(study_plan, folder, command="test", **options)


def populations(folder: Path) -> list[int]:
    path = folder / "populations.txt"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def way(folder: Path) -> str:
    return StudyRecord.read(folder).provenance["invocations"][-1]["way"]


# What is handed out


def planned_runs(
    study_plan: StudyPlan, ask: Callable[[TaskSpec], TaskAnswer] = study_fixture.ask
) -> tuple[list[PlannedRun], dict[str, Any]]:
    facts, entries = expand(study_plan, ask)
    return list(StudyRecord(plan=study_plan, code_hash="", provenance={}, tasks=facts, entries=entries).runs), facts


def test_alike_runs_are_handed_out_together_and_shared_among_workers():
    runs, facts = planned_runs(plan("tied", "other"))
    queue = deque(runs)
    handouts = Handouts(asked=None, workers=1, facts=facts)
    assert [len(handouts.take(queue, 2**40)) for _ in range(2)] == [3, 6]
    assert not queue
    queue = deque(runs)
    handouts = Handouts(asked=None, workers=2, facts=facts)
    taken = [[planned.path for planned in handouts.take(queue, 2**40)] for _ in range(4)]
    assert taken[0] == ["bytes/mha/seed-0", "bytes/mha/seed-1"]
    assert taken[1] == ["bytes/tied/seed-0", "bytes/other/seed-0", "bytes/tied/seed-1"]
    assert [len(paths) for paths in taken] == [2, 3, 2, 1]
    assert [planned.path for planned in queue] == ["bytes/other/seed-2"]
    queue = deque(runs)
    assert [len(Handouts(asked=2, workers=1, facts=facts).take(queue, 0)) for _ in range(4)] == [2, 2, 2, 1]
    assert [
        len(Handouts(asked=n, workers=1, facts=facts).take(deque(runs), m)) for n, m in ((None, 0), (1, 2**40))
    ] == [1, 1]


def test_no_more_are_handed_out_than_memory_holds():
    runs, facts = planned_runs(plan("tied", seeds=list(range(9))))
    memory = next(
        size for size in range(0, 2**40, 2**20) if models_in(size, runs[0].run, facts["bytes"].tokens_per_example) == 4
    )
    for asked, taken in ((None, 4), (3, 3), (8, 4)):
        assert len(Handouts(asked=asked, workers=1, facts=facts).take(deque(runs), memory)) == taken


def test_runs_with_dropout_are_handed_out_one_by_one_and_it_is_said_how():
    runs, facts = planned_runs(plan("tied", model={**PLAN["model"], "dropout": 0.1}))
    handouts = Handouts(asked=None, workers=7, facts=facts)
    queue = deque(runs)
    assert [len(handouts.take(queue, 2**40)) for _ in range(6)] == [1] * 6
    assert handouts.describe(runs, "NVIDIA X", 2**40) == "one run at a time on each graphics processor"
    assert handouts.describe(runs, "cpu", 0) == "one run at a time in each process"


# What befalls it


@pytest.mark.usefixtures("_fake_workers")
def test_a_graphics_processor_is_given_populations_and_the_record_says_so(tmp_path: Path):
    told: list[StudyProgress] = []
    results = run(plan("tied", "other"), tmp_path, observe=told.append)
    assert populations(tmp_path) == [3, 6]
    assert set(results.runs.status) == {"done"}
    assert way(tmp_path) == "populations of up to 6 on NVIDIA X"
    assert told[-1].done == told[-1].total == 9
    assert max(len(progress.under_way) for progress in told) == 6
    alone = run(plan("tied", "other"), tmp_path / "alone", population=1)
    assert populations(tmp_path / "alone") == []
    assert set(alone.runs.status) == {"done"}
    assert way(tmp_path / "alone") == "one run at a time on each graphics processor"
    with pytest.raises(TwofoldError, match="at least one run in a population, not 0"):
        run(plan("tied"), tmp_path, population=0)


@pytest.mark.usefixtures("_fake_workers")
def test_in_a_population_that_dies_those_that_had_not_ended_fail_and_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    results = run(plan("tied", "bad", "dies"), tmp_path)
    status = dict(zip(results.runs.variant + results.runs.seed.astype(str), results.runs.status, strict=True))
    assert [status[f"mha{seed}"] for seed in range(3)] == ["done"] * 3
    assert [status[f"bad{seed}"] for seed in range(3)] == ["failed"] * 3
    assert [status[f"dies{seed}"] for seed in range(3)] == ["failed"] * 3
    assert [status[f"tied{seed}"] for seed in range(3)] == ["done", "failed", "failed"], "seed by seed, up to the death"
    errors = dict(zip(results.runs.variant + results.runs.seed.astype(str), results.runs.error, strict=True))
    assert errors["bad0"] == "The loss is NaN at step 7."
    assert all("signal 9" in errors[name] for name in ("dies0", "tied1", "bad1"))
    monkeypatch.setenv("STUDY_WORKER_MEMORY", "0")
    again = run(plan("tied", "bad", "dies"), tmp_path)
    assert set(again.runs[again.runs.variant == "tied"].status) == {"done"}


@pytest.mark.usefixtures("_fake_workers")
def test_the_chosen_points_of_a_tuned_axis_are_populations_too(tmp_path: Path):
    grid = [{"name": "rate", "tune": True, "points": [
        {"name": f"lr{rate}", "training": {"learning_rate": rate}} for rate in (1e-3, 4e-3, 16e-3)
    ]}]  # fmt: skip
    results = run(plan("tied", grid=grid), tmp_path)
    assert set(results.runs.status) == {"done"}
    assert populations(tmp_path) == [3, 3, 2, 2]


def test_a_worker_says_how_each_of_many_runs_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs, _ = planned_runs(parsed(), worker.ask)
    told: list[dict[str, Any]] = []
    orders = [
        {
            "path": planned.path,
            "run": planned.run.to_dict(),
            "folder": str(planned.folder(tmp_path)),
            "data_hash": data_hash(),
        }
        for planned in runs
        if planned.entry.variant == "free"
    ]
    taken = Path(orders[1]["folder"])
    taken.mkdir(parents=True)
    (taken / "metrics.jsonl").touch()
    worker._serve({"command": "run-many", "runs": orders, "keep_model": False}, told.append)
    assert [values["event"] for values in told if values["event"] != "progress"] == ["ended", "ended", "done"]
    good, bad = (values for values in told if values["event"] == "ended")
    assert good == {"event": "ended", "path": "reverse/free/seed-0", "status": "done", "error": ""}
    assert bad["status"] == "failed"
    assert "metrics.jsonl but no run.json" in bad["error"]
    folder = Path(orders[0]["folder"])
    assert not (folder / "checkpoints").exists()
    assert not (folder / "model").exists()
    told.clear()
    worker._serve(
        {"command": "run-many", "runs": [orders[0] | {"data_hash": "0" * 64}], "keep_model": False}, told.append
    )
    assert told[0]["event"] == "failed"
    assert "are not those with which the study was begun" in told[0]["error"]


# Real training


def parsed() -> StudyPlan:
    return parse_plan(STUDY, "mini.toml")


def data_hash() -> str:
    entry = parsed().planned_tasks[0]
    return worker.ask(TaskSpec(name=entry.task, options=entry.options)).data_hash


def test_a_study_of_populations_gives_what_the_runs_alone_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner, "graphics_processors", lambda: 0)
    together = run(parsed(), tmp_path / "together", workers=1, population=8)
    alone = run(parsed(), tmp_path / "alone", workers=1)
    assert set(together.runs.status) == {"done"}
    assert way(tmp_path / "together") == "populations of up to 2 on cpu"
    only_core = len(os.sched_getaffinity(0)) == 1 if hasattr(os, "sched_getaffinity") else os.cpu_count() == 1
    assert way(tmp_path / "alone") == ("one process per core" if only_core else "one run at a time in each process")
    for column in [name for name in alone.runs if name.startswith("score:")]:
        assert list(together.runs[column]) == pytest.approx(list(alone.runs[column]), rel=1e-4)
    keys = ["task", "variant", "seed", "step", "split", "metric"]
    mine, other = (results.curves.sort_values(keys).reset_index(drop=True) for results in (together, alone))
    assert mine[keys].equals(other[keys])
    assert list(mine.value) == pytest.approx(list(other.value), rel=1e-3, abs=1e-6)
