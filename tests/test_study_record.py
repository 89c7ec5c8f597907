"""What lies in a study's folder: study.json, the states of runs, curves, the lock; and what becomes of damaged files."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from study_fixture import PLAN, ask, write_study
from twofold import lock
from twofold.errors import TwofoldError
from twofold.lock import FolderLock, is_held
from twofold.storage import read_json, write_json
from twofold.study import provenance
from twofold.study.expansion import expand
from twofold.study.plan import StudyPlan
from twofold.study.pool import _visible
from twofold.study.record import StudyRecord
from twofold.study.results import CURVE_COLUMNS, Results


def record() -> StudyRecord:
    plan = StudyPlan.model_validate(PLAN)
    tasks, entries = expand(plan, ask)
    return StudyRecord(plan=plan, code_hash="c", provenance={"command": "x"}, tasks=tasks, entries=entries)


# study.json


def test_a_record_is_read_as_it_was_written(tmp_path: Path):
    written = record()
    written.write(tmp_path)
    read = StudyRecord.read(tmp_path)
    assert read == written
    runs = list(read.runs)
    assert len(runs) == 6 * 2 * 3
    assert [run.seed for run in runs[:12]] == [0] * 12
    assert len({run.path for run in runs}) == len({run.fingerprint for run in runs}) == len(runs)
    for run in runs[:3]:
        assert run.run.fingerprint == run.fingerprint
        assert run.run.seed == run.seed
        assert run.folder(tmp_path) == tmp_path / "runs" / run.entry.task / run.entry.variant / f"seed-{run.seed}"


def test_a_folder_without_a_record_or_with_a_damaged_one(tmp_path: Path):
    with pytest.raises(TwofoldError, match=r"holds no study\.json, so it is no study folder"):
        StudyRecord.read(tmp_path)
    record().write(tmp_path)
    path = tmp_path / "study.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(TwofoldError, match=r"study\.json cannot be read .*: begin again in a new folder"):
        StudyRecord.read(tmp_path)
    path.write_text(json.dumps(json.loads(whole) | {"format": 99}))
    with pytest.raises(TwofoldError, match="is of format 99, and this version reads format 1"):
        StudyRecord.read(tmp_path)
    path.write_text(json.dumps({**json.loads(whole), "entries": [{}]}))
    with pytest.raises(TwofoldError, match="cannot be read"):
        StudyRecord.read(tmp_path)


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    path.write_text('{"a": ')
    assert read_json(path) == {}
    path.write_text("[1]")
    assert read_json(path) == {}
    assert read_json(tmp_path / "gone.json") == {}


# Results


def test_results_show_every_state(tmp_path: Path):
    write_study(tmp_path)
    results = Results.load(tmp_path)
    runs = results.runs
    assert dict(runs.status.value_counts()) == {"done": 24, "pending": 10, "failed": 1, "running": 1}
    failed = runs[runs.status == "failed"].iloc[0]
    assert failed.error == "The loss is NaN at step 100."
    assert math.isnan(failed["score:loss"])
    done = runs[runs.status == "done"]
    assert done["score:loss"].notna().all()
    assert (done.tokens_per_second == done.tokens / done.seconds).all()
    assert set(results.by_seed("bytes", "kv-tied", "bits_per_byte")) == {0, 1}
    assert results.by_seed("bytes", "kv-tied", "accuracy") == {}
    assert results.by_seed("bytes", "kv-tied", "no such metric") == {}
    assert tuple(results.curves.columns) == CURVE_COLUMNS
    (tmp_path / "runner.lock").unlink()
    assert "running" not in set(Results.load(tmp_path).runs.status), "its runner is gone: the run waits for the next"


def test_results_before_the_first_run(tmp_path: Path):
    record().write(tmp_path)
    results = Results.load(tmp_path)
    assert set(results.runs.status) == {"pending"}
    assert results.curves.empty
    assert tuple(results.curves.columns) == CURVE_COLUMNS


def test_of_a_repeated_step_the_last_line_counts_and_half_a_line_none(tmp_path: Path):
    write_study(tmp_path, complete=True)
    planned = next(StudyRecord.read(tmp_path).runs)
    metrics = planned.folder(tmp_path) / "metrics.jsonl"
    before = Results.load(tmp_path).curves
    first = json.loads(metrics.read_text().splitlines()[0])
    with metrics.open("a") as file:
        file.write(json.dumps(first | {"loss": -7.0, "note": "x"}) + "\n")
        file.write('{"step": 20, "tokens": 1')
    after = Results.load(tmp_path).curves
    assert len(after) == len(before)
    chosen = (after.task == "bytes") & (after.variant == "mha") & (after.seed == 0) & (after.step == 10)
    assert list(after[chosen & (after.metric == "loss") & (after.split == "train")].value) == [-7.0]
    assert "note" not in set(after.metric)
    assert "seconds" not in set(after.metric)


# The lock


HOLD = "import sys, time; from pathlib import Path; from twofold.lock import FolderLock\nwith FolderLock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_a_lock_dies_with_its_holder_and_names_it(tmp_path: Path):
    assert not is_held(tmp_path)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    with holder.stdout:
        assert holder.stdout.readline() == b"held\n"
        assert is_held(tmp_path)
        with (
            pytest.raises(TwofoldError, match=f"is being run by process {holder.pid} on .*: wait for it, stop it,"),
            FolderLock(tmp_path),
        ):
            pass
        assert is_held(tmp_path), "who was refused must not take the note away"
        holder.kill()
        holder.wait()
    assert not is_held(tmp_path)
    with FolderLock(tmp_path):
        assert is_held(tmp_path)
    assert not is_held(tmp_path)
    assert (tmp_path / "runner.lock").read_text() == ""


@pytest.mark.parametrize(
    ("note", "held"),
    [
        ("", False),
        ("{half", False),
        ("[]", False),
        ('{"pid": 1}', False),
        ('{"pid": 999999999, "host": "HERE", "created": 0}', False),
        ('{"pid": OWN, "host": "HERE", "created": 0}', False),
        ('{"pid": 1, "host": "another machine", "created": 0}', True),
    ],
)
def test_a_note_is_believed_only_of_a_living_process(tmp_path: Path, note: str, held: bool):
    (tmp_path / lock.FILE_NAME).write_text(
        note.replace("OWN", str(os.getpid())).replace("HERE", lock.socket.gethostname())
    )
    assert is_held(tmp_path) is held


# Provenance and processors


def test_the_code_hash_changes_with_what_computes_and_with_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, text in {
        "attention.py": "a",
        "models/blocks.py": "b",
        "cli/train.py": "c",
        "study/plan.py": "d",
        "__init__.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)

    def hashed() -> str:
        provenance.code_hash.cache_clear()
        return provenance.code_hash()

    first = hashed()
    (tmp_path / "cli/train.py").write_text("other")
    (tmp_path / "study/plan.py").write_text("other")
    assert hashed() == first
    (tmp_path / "models/blocks.py").write_text("other")
    second = hashed()
    assert second != first
    monkeypatch.setattr(provenance, "library_versions", lambda: {"torch": "0"})
    assert hashed() != second
    provenance.code_hash.cache_clear()


def test_provenance_says_where_numbers_come_from_and_is_json():
    told = provenance.describe("twofold study run x")
    assert json.loads(json.dumps(told)) == told
    assert told["command"] == "twofold study run x"
    assert told["hardware"]["cores"] == provenance.usable_cores() >= 1
    assert told["torch"] == provenance.library_versions()["torch"] != "not installed"
    assert str(Path.home()) not in json.dumps(told)


def test_a_worker_sees_one_graphics_processor_or_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _visible(None) == {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    assert _visible(1)["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert _visible(1)["CUDA_VISIBLE_DEVICES"] == "7"
    with pytest.raises(TwofoldError, match="no graphics processor number 2: CUDA_VISIBLE_DEVICES allows 2"):
        _visible(2)


@pytest.mark.parametrize(("allowed", "wanted"), [(None, 3), ("", 0), ("1", 1), ("0,2", 2), ("0,1,2,3", 3)])
def test_graphics_processors_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: str | None, wanted: int
):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nfor i in 0 1 2; do echo \"GPU $i: A (UUID: x)\"; echo ' MIG 1g'; done\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    if allowed is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    assert provenance.graphics_processors() == wanted
    program.write_text("#!/bin/sh\nexit 9\n")
    assert provenance.graphics_processors() == 0
