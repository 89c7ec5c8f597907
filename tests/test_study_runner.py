"""The runner's promises, with workers that train nothing: nothing twice, failures survived, other results refused, no process left over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from study_fixture import PLAN
from twofold.errors import TwofoldError
from twofold.lock import FolderLock, is_held
from twofold.study import pool, resumption, runner
from twofold.study.plan import StudyPlan
from twofold.study.progress import Clock, RunUnderWay, StudyProgress
from twofold.study.record import StudyRecord
from twofold.study.results import Results
from twofold.study.runner import run_study
from twofold.training.progress import Progress

WORKER = (sys.executable, str(Path(__file__).with_name("study_worker.py")))
COMMAND = "twofold study run test"


@pytest.fixture(autouse=True)
def _fake_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "COMMAND", WORKER)
    monkeypatch.setattr(runner, "graphics_processors", lambda: 0)
    monkeypatch.setenv("STUDY_WORKER_SECONDS", "30")


def plan(*variants: str, **changes: Any) -> StudyPlan:
    """One task, the reference and ``variants``, two seeds."""
    chosen = [
        {"name": "mha", "label": "(Q, K, V)"},
        *({"name": name, "model": {"tie": "(Q, K=V)"}} for name in variants),
    ]
    return StudyPlan.model_validate(
        {**PLAN, "variants": chosen, "tasks": [PLAN["tasks"][0]], "seeds": [0, 1], **changes}
    )


def calls(folder: Path) -> list[str]:
    path = folder / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def run(study_plan: StudyPlan, folder: Path, **options: Any) -> Results:
    return run_study(study_plan, folder, **{"command": COMMAND, "workers": 1, **options})


def test_every_run_is_run_once_and_seed_by_seed(tmp_path: Path):
    results = run(plan("tied", "other"), tmp_path / "new" / "study")
    folder = results.folder
    assert [path.split("/")[2] for path in calls(folder)] == ["seed-0"] * 3 + ["seed-1"] * 3
    assert len(set(calls(folder))) == 6
    assert set(results.runs.status) == {"done"}
    assert not is_held(folder)
    record = StudyRecord.read(folder)
    assert record.provenance["command"] == COMMAND
    assert record.provenance["invocations"][0]["device"] == "cpu"
    assert record.provenance["hardware"]["gpus"] == []
    again = run(plan("tied", "other"), folder)
    assert len(calls(folder)) == 6
    assert list(again.runs.status) == list(results.runs.status)
    assert len(StudyRecord.read(folder).provenance["invocations"]) == 2


def test_a_failed_run_and_a_dead_worker_are_reported_and_passed_and_tried_again(tmp_path: Path):
    study_plan = plan("bad", "dies", "tied")
    results = run(study_plan, tmp_path, workers=2)
    by_variant = dict(list(results.runs.groupby("variant")))
    assert list(by_variant["mha"].status) == list(by_variant["tied"].status) == ["done", "done"]
    assert list(by_variant["bad"].error) == ["The loss is NaN at step 7."] * 2
    assert set(by_variant["dies"].status) == {"failed"}
    assert all("signal 9" in error and "worker-" in error for error in by_variant["dies"].error)
    before = calls(tmp_path)
    run(study_plan, tmp_path, workers=2)
    again = calls(tmp_path)[len(before) :]
    assert sorted(again) == sorted(path for path in before if "/bad/" in path or "/dies/" in path)


@pytest.mark.parametrize(
    ("only", "wanted"),
    [
        ([], 12),
        (["bytes"], 6),
        (["tied"], 4),
        (["bytes", "recall", "tied", "seed-1"], 2),
        (["mha", "tied", "recall"], 4),
    ],
)
def test_only_picks_any_subset(tmp_path: Path, only: list[str], wanted: int):
    both = plan("tied", "other", tasks=PLAN["tasks"])
    results = run(both, tmp_path, only=only)
    assert len(calls(tmp_path)) == wanted
    assert (results.runs.status == "done").sum() == wanted
    assert (results.runs.status == "pending").sum() == 12 - wanted


def test_only_picks_points_of_a_grid_and_refuses_what_is_none(tmp_path: Path):
    grid = [
        {"name": "length", "points": [{"name": "T16"}, {"name": "T64"}]},
        {"name": "depth", "points": [{"name": "L2"}, {"name": "L4", "model": {"num_hidden_layers": 4}}]},
    ]
    study_plan = plan("tied", grid=grid)
    run(study_plan, tmp_path, only=["T64", "L4", "seed-0", "mha"])
    assert calls(tmp_path) == ["bytes-T64-L4/mha/seed-0"]
    with pytest.raises(TwofoldError, match="called 'T46': did you mean 'T64'"):
        run(study_plan, tmp_path, only=["T46"])
    with pytest.raises(TwofoldError, match=r"called '♜'; it has .*variant: mha, tied"):
        run(study_plan, tmp_path, only=["♜"])


def test_other_plans_and_other_code_are_refused_unless_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(plan("tied"), tmp_path)
    more_seeds = plan("tied", seeds=[0, 1, 2])
    with pytest.raises(
        TwofoldError, match=r"another plan \(seeds: \[0, 1\] is now \[0, 1, 2\]\).*--folder.*--accept-changes"
    ):
        run(more_seeds, tmp_path)
    monkeypatch.setattr(resumption, "code_hash", lambda: "another")
    with pytest.raises(TwofoldError, match=r"other code \(Twofold's sources changed since"):
        run(plan("tied"), tmp_path)
    assert len(calls(tmp_path)) == 4
    results = run(more_seeds, tmp_path, accept_changes=True)
    assert len(calls(tmp_path)) == len(set(calls(tmp_path))) == 6
    assert results.provenance["plan_changes"][0]["what"] == "seeds: [0, 1] is now [0, 1, 2]"
    assert results.provenance["code_changes"][0]["to"] == "another"
    run(more_seeds, tmp_path)
    # What would mix two configurations in one folder is refused even so.
    with pytest.raises(TwofoldError, match="seed-0 holds a run whose training differ"):
        run(plan("tied", training={**PLAN["training"], "steps": 300}), tmp_path, accept_changes=True)


def test_a_plan_that_cannot_be_expanded_is_refused_before_anything_runs(tmp_path: Path):
    bad = plan("tied", model={**PLAN["model"], "num_key_value_heads": 3})
    with pytest.raises(TwofoldError, match="In task bytes, variant mha: "):
        run(bad, tmp_path)
    assert not (tmp_path / "study.json").exists()
    assert not calls(tmp_path)


def test_a_task_without_data_stops_only_who_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    both = plan("tied", tasks=PLAN["tasks"])
    monkeypatch.setenv("STUDY_WORKER_LACKS", "recall")
    with pytest.raises(TwofoldError, match="In task recall: There is no folder data/recall"):
        run(both, tmp_path)
    results = run(both, tmp_path, only=["bytes"])
    assert set(results.tasks) == {"bytes"}
    assert set(results.runs.status) == {"done"}
    with pytest.raises(TwofoldError, match="There is no folder data/recall"):
        run(both, tmp_path, only=["recall", "seed-0"])
    assert set(StudyRecord.read(tmp_path).tasks) == {"bytes"}
    monkeypatch.delenv("STUDY_WORKER_LACKS")
    results = run(both, tmp_path)
    assert list(results.tasks) == ["bytes", "recall"]
    assert set(results.runs.status) == {"done"}
    assert len(calls(tmp_path)) == len(set(calls(tmp_path))) == 8


def test_what_a_task_has_said_stays_said(tmp_path: Path):
    results = run(plan("tied", tasks=PLAN["tasks"]), tmp_path)
    new = StudyRecord.read(tmp_path)
    facts, entries = new.tasks["bytes"], tuple(entry for entry in new.entries if entry.task == "bytes")
    old = replace(new, tasks={"bytes": replace(facts, data_hash="old")}, entries=entries)
    both = resumption.joined(old, new)
    assert list(both.tasks) == list(results.tasks)
    assert both.tasks["bytes"].data_hash == "old" != both.tasks["recall"].data_hash
    assert both.entries == new.entries


def test_a_worker_that_cannot_start_ends_the_study_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STUDY_WORKER_BROKEN", "1")
    with pytest.raises(TwofoldError, match=r"before it could work.*libtorch.so is missing"):
        run(plan("tied"), tmp_path)
    with pytest.raises(TwofoldError, match="at least one worker, not 0"):
        run(plan("tied"), tmp_path, workers=0)


def test_two_runners_do_not_share_a_folder(tmp_path: Path):
    with FolderLock(tmp_path), pytest.raises(TwofoldError, match=f"is being run by process {os.getpid()} "):
        run(plan("tied"), tmp_path)


def test_progress_and_changes_are_told(tmp_path: Path):
    told: list[StudyProgress] = []
    seen: list[int] = []

    def look() -> None:
        seen.append(int((Results.load(tmp_path).runs.status == "done").sum()))

    run(plan("bad"), tmp_path, observe=told.append, on_change=look)
    assert [told[0].phase, told[-1].phase] == ["starting", "finished"]
    assert (told[-1].done, told[-1].failed, told[-1].total, told[-1].seconds_left) == (2, 2, 4, 0.0)
    under_way = [run for progress in told for run in progress.under_way if run.progress]
    assert {run.share for run in under_way} == {0.25}
    assert under_way[0].path == "bytes/mha/seed-0"
    assert seen[-1] == 2
    assert len(seen) >= 2


def test_an_error_while_telling_ends_the_study(tmp_path: Path):
    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(plan("tied"), tmp_path, on_change=broken)
    assert not is_held(tmp_path)
    assert set(run(plan("tied"), tmp_path).runs.status) == {"done"}


RUNNER = """
import json, sys
from pathlib import Path
from twofold.study import pool, runner
from twofold.study.plan import StudyPlan
pool.COMMAND = tuple(json.loads(sys.argv[1]))
runner.graphics_processors = lambda: 0
runner.run_study(StudyPlan.model_validate(json.loads(sys.argv[2])), Path(sys.argv[3]), command="test", workers=2)
"""


def test_graphics_processors_are_named_and_one_worker_serves_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner, "graphics_processors", lambda: 2)
    monkeypatch.setenv("STUDY_WORKER_DEVICE", "NVIDIA X")
    results = run(plan("tied"), tmp_path, workers=None)
    assert results.provenance["hardware"]["gpus"] == ["NVIDIA X"]
    assert results.provenance["invocations"][0]["workers"] == 2


def test_graphics_processors_that_torch_cannot_use_leave_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner, "graphics_processors", lambda: 1)
    monkeypatch.setattr(runner, "usable_cores", lambda: 3)
    results = run(plan("tied"), tmp_path, workers=None)
    assert results.provenance["hardware"]["gpus"] == []
    assert results.provenance["invocations"][0]["workers"] == 3


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_runner_that_is_ended_leaves_no_process_and_nothing_is_run_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
):
    study_plan = plan("slow", "tied")
    arguments = [json.dumps(WORKER), json.dumps(study_plan.to_dict()), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen([sys.executable, "-c", RUNNER, *arguments], env=environment, stderr=subprocess.DEVNULL)
    wait_for(lambda: any("slow" in path for path in calls(tmp_path)) and len(calls(tmp_path)) >= 3)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) == 2
    assert is_held(tmp_path)
    process.send_signal(how)
    process.wait(10)
    wait_for(lambda: not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers))
    assert not is_held(tmp_path)
    before = Results.load(tmp_path).runs
    assert (before.status == "done").sum() >= 1
    assert not (before.status == "running").any()
    finished = {f"bytes/{row.variant}/seed-{row.seed}" for row in before.itertuples() if row.status == "done"}
    monkeypatch.setenv("STUDY_WORKER_SECONDS", "0")
    results = run(study_plan, tmp_path)
    assert set(results.runs.status) == {"done"}
    assert all(calls(tmp_path).count(path) == 1 for path in finished)


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_a_finished_run_that_does_not_say_so_is_not_run_again(tmp_path: Path):
    run(plan("tied"), tmp_path)
    status = tmp_path / "runs/bytes/tied/seed-1/status.json"
    status.write_text('{"status": "running", "error": ""}')
    results = run(plan("tied"), tmp_path)
    assert len(calls(tmp_path)) == 4
    assert set(results.runs.status) == {"done"}


def under_way(path: str, step: int) -> RunUnderWay:
    told = {"tokens": 0, "loss": 1.0, "seconds": 1.0, "tokens_per_second": 1.0, "seconds_left": 1.0}
    return RunUnderWay(path=path, progress=Progress(step=step, steps=100, **told))


def test_the_clock_counts_only_what_this_runner_did():
    clock = Clock({"a": 10.0, "b": 10.0, "c": 20.0})
    assert clock.seconds_left((), 5.0) is None
    clock.began(under_way("a", 50))  # an earlier runner did half of it
    clock.began(under_way("b", 1))
    assert clock.seconds_left((under_way("a", 100), under_way("b", 50)), 10.0) == pytest.approx(25.0)
    clock.ended("a")
    clock.ended("b")
    assert clock.seconds_left((), 15.0) == pytest.approx(20.0)
    clock.ended("c")
    assert clock.seconds_left((), 35.0) == 0.0
