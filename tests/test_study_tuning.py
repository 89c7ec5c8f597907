"""Tuned axes: all points at the seeds that choose, the others at the best point only, the same after every kill, and nothing twice."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from study_fixture import PLAN
from twofold.errors import TwofoldError
from twofold.study import pool, runner
from twofold.study.plan import StudyPlan
from twofold.study.progress import Clock, StudyProgress
from twofold.study.results import Results
from twofold.study.runner import run_study

WORKER = (sys.executable, str(Path(__file__).with_name("study_worker.py")))
RATES = {"lr0.001": 1e-3, "lr0.004": 4e-3, "lr0.016": 1.6e-2}
AXIS = {
    "name": "learning rate", "tune": True,
    "points": [{"name": name, "training": {"learning_rate": rate}} for name, rate in RATES.items()],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fake_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "COMMAND", WORKER)
    monkeypatch.setattr(runner, "graphics_processors", lambda: 0)


def plan(*variants: str, **changes: Any) -> StudyPlan:
    """One task, its learning rate tuned, the reference and ``variants``, three seeds."""
    chosen = [{"name": "mha"}, *({"name": name, "model": {"tie": "(Q, K=V)"}} for name in variants)]
    values = {**PLAN, "variants": chosen, "tasks": [{**PLAN["tasks"][0], "grid": [AXIS]}], "seeds": [0, 1, 2]}
    return StudyPlan.model_validate(values | changes)


def calls(folder: Path) -> list[str]:
    path = folder / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def run(study_plan: StudyPlan, folder: Path, **options: Any) -> Results:
    return run_study(study_plan, folder, **{"command": "twofold study run test", "workers": 1, **options})


def paths(variant: str, rate: str, *seeds: int) -> set[str]:
    return {f"bytes-{rate}/{variant}/seed-{seed}" for seed in seeds}


def test_every_point_is_run_at_the_first_seed_and_the_best_one_at_the_others(tmp_path: Path):
    told: list[StudyProgress] = []
    study_plan = plan("tied")
    results = run(study_plan, tmp_path, observe=told.append)
    made = calls(tmp_path)
    choosing = {path for rate in RATES for name in ("mha", "tied") for path in paths(name, rate, 0)}
    assert set(made[:6]) == choosing
    assert set(made[6:]) == paths("mha", "lr0.001", 1, 2) | paths("tied", "lr0.004", 1, 2)
    assert len(made) == len(set(made)) == study_plan.run_count == 10
    assert {progress.total for progress in told if progress.phase == "training"} == {10}
    assert (told[-1].done, told[-1].failed, told[-1].total) == (10, 0, 10)
    chosen = {key: (choice.task, choice.at_edge) for key, choice in results.choices.items()}
    assert chosen == {
        ("bytes", "mha"): ("bytes-lr0.001", ("learning rate",)), ("bytes", "tied"): ("bytes-lr0.004", ()),
    }  # fmt: skip
    assert dict(results.runs.purpose.value_counts()) == {"result": 6, "tuning": 4}
    again = run(study_plan, tmp_path)
    assert len(calls(tmp_path)) == 10
    assert again.runs.equals(results.runs)


def test_at_its_choices_a_study_has_one_task_per_setting(tmp_path: Path):
    lengths = {"name": "length", "points": [{"name": "T8", "options": {"length": 8}}, {"name": "T9"}]}
    study_plan = plan("tied", tasks=[{**PLAN["tasks"][0], "grid": [lengths, AXIS]}])
    run(study_plan, tmp_path, only=["bytes-T8"])
    assert len(calls(tmp_path)) == 2 * (3 + 2)
    results = run(study_plan, tmp_path)
    shown = results.at_choices()
    assert list(shown.tasks) == ["bytes-T8", "bytes-T9"]
    assert shown.tasks["bytes-T9"].points == {"length": "T9"}
    assert shown.tasks["bytes-T9"].title == "Bytes of source text, T9"
    assert len(shown.runs) == 2 * 2 * 3
    assert shown.by_seed("bytes-T8", "tied", "bits_per_byte") == {0: 1.5, 1: 1.5, 2: 1.5}


def test_seeds_that_only_choose_are_in_no_result(tmp_path: Path):
    study_plan = plan("tied", seeds=[0, 1], tuning_seeds=[7, 8])
    results = run(study_plan, tmp_path)
    assert len(calls(tmp_path)) == study_plan.run_count == 2 * 3 * 2 + 2 * 2
    assert set(results.runs[results.runs.seed >= 7].purpose) == {"tuning"}
    assert set(results.at_choices().by_seed("bytes", "tied", "bits_per_byte")) == {0, 1}


def test_of_several_tuned_axes_the_points_are_the_product(tmp_path: Path):
    decay = {
        "name": "decay",
        "tune": True,
        "points": [{"name": "w0", "training": {"weight_decay": 0.0}}, {"name": "w1"}],
    }
    study_plan = plan(tasks=[PLAN["tasks"][0]], grid=[AXIS, decay])
    results = run(study_plan, tmp_path)
    assert len(calls(tmp_path)) == study_plan.run_count == 6 + 2
    (choice,) = results.choices.values()
    assert choice.points == {"learning rate": "lr0.001", "decay": "w0"}
    assert choice.at_edge == ("learning rate",), "an axis of two points has no inside"


def test_a_point_of_which_a_run_failed_loses_and_may_win_when_it_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told: list[StudyProgress] = []
    monkeypatch.setenv("STUDY_WORKER_FAILS", "bytes-lr0.004/tied/seed-0")
    results = run(plan("tied"), tmp_path, observe=told.append)
    first = results.choices["bytes", "tied"].task
    assert first in {"bytes-lr0.001", "bytes-lr0.016"}
    assert (told[-1].done, told[-1].failed, told[-1].total) == (9, 1, 10)
    monkeypatch.delenv("STUDY_WORKER_FAILS")
    results = run(plan("tied"), tmp_path, observe=told.append)
    assert results.choices["bytes", "tied"].task == "bytes-lr0.004"
    made = calls(tmp_path)
    assert paths("tied", "lr0.004", 1, 2) <= set(made[10:])
    assert (told[-1].done, told[-1].failed, told[-1].total) == (10, 0, 10)
    assert (results.runs[results.runs.task == first].purpose == "tuning").sum() >= 2, "what was run is not hidden"
    assert results.at_choices().by_seed("bytes", "tied", "bits_per_byte") == {0: 1.5, 1: 1.5, 2: 1.5}


def test_a_variant_of_which_every_point_fails_has_no_choice(tmp_path: Path):
    told: list[StudyProgress] = []
    results = run(plan("bad"), tmp_path, observe=told.append)
    choice = results.choices["bytes", "bad"]
    assert choice.task is None
    assert not choice.is_open
    assert (told[-1].done, told[-1].failed, told[-1].total) == (5, 3, 8)
    shown = results.at_choices().runs
    assert list(shown[shown.variant == "bad"].status) == ["pending"] * 3
    assert results.undecided == 0


@pytest.mark.parametrize("kept", range(0, 10, 3))
def test_a_study_that_is_cut_anywhere_ends_the_same_and_runs_nothing_twice(tmp_path: Path, kept: int):
    whole = run(plan("tied"), tmp_path / "whole")
    made = calls(whole.folder)
    for path in made[kept:]:
        shutil.rmtree(whole.folder / "runs" / path)
    (whole.folder / "calls.txt").unlink()
    again = run(plan("tied"), whole.folder)
    assert sorted(calls(whole.folder)) == sorted(made[kept:])
    assert again.runs.equals(whole.runs)


def test_only_goes_on_to_work(tmp_path: Path):
    study_plan = plan("tied")
    with pytest.raises(TwofoldError, match=r"run those that choose first \(--only seed-0\)\."):
        run(study_plan, tmp_path, only=["seed-1"])
    run(study_plan, tmp_path, only=["seed-0", "tied"])
    assert len(calls(tmp_path)) == 3
    told: list[StudyProgress] = []
    results = run(study_plan, tmp_path, only=["seed-1"], observe=told.append)
    assert set(calls(tmp_path)[3:]) == paths("tied", "lr0.004", 1)
    assert told[-1].total == told[-1].done == 1
    assert results.choices["bytes", "mha"].is_open
    assert results.undecided == 2
    results = run(study_plan, tmp_path, only=["lr0.016"])
    assert set(calls(tmp_path)[4:]) == paths("mha", "lr0.016", 0)
    run(study_plan, tmp_path, only=["bytes", "mha", "seed-0", "seed-2"])
    assert set(calls(tmp_path)[5:]) == paths("mha", "lr0.001", 0, 2) | paths("mha", "lr0.004", 0)


def test_a_setting_beside_one_that_is_not_tuned(tmp_path: Path):
    study_plan = plan(tasks=[PLAN["tasks"][0], {**PLAN["tasks"][0], "name": "other", "grid": [AXIS]}])
    results = run(study_plan, tmp_path)
    assert len(calls(tmp_path)) == study_plan.run_count == 3 + 3 + 2
    assert list(results.at_choices().tasks) == ["bytes", "other"]


def test_the_clock_counts_what_is_still_to_be_chosen():
    clock = Clock({"a": 10.0, "guess": 20.0})
    clock.ended("a")
    assert clock.seconds_left((), 5.0) == pytest.approx(10.0)
    clock.replace(["guess"], {"b": 40.0})
    assert clock.seconds_left((), 5.0) == pytest.approx(20.0)
    clock.ended("b")
    assert clock.seconds_left((), 5.0) == 0.0
