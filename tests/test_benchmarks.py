"""The benchmark of a training step: the two models are one function, and its rows have the form that programs read. No time is judged here."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

STEP = Path(__file__).resolve().parent.parent / "benchmarks" / "step.py"
TINY = ["--device", "cpu", "--shape", "tiny", "--rounds", "1"]


@pytest.fixture(scope="module")
def step() -> ModuleType:
    spec = importlib.util.spec_from_file_location("step", STEP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_rows(rows: list[dict]) -> None:
    assert all(list(row) == ["name", "value", "unit", "goal", "met"] for row in rows)
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        assert type(row["value"]) in (int, float)
        assert row["unit"] in ("ratio", "tokens/s", "MiB")
        if row["unit"] == "ratio":
            assert row["met"] is (row["value"] <= float(row["goal"].removeprefix("<= ")))
        else:
            assert (row["goal"], row["met"]) == (None, None)
    goals = {row["name"]: row["goal"] for row in rows if row["goal"]}
    assert goals == {
        "step time, ours (Q, K, V) / plain": "<= 1.03",
        "peak memory, ours (Q, K, V) / plain": "<= 1.03",
        "step time, ours (Q, K=V) / ours (Q, K, V)": "<= 1.0",
        "peak memory, ours (Q, K=V) / ours (Q, K, V)": "<= 1.0",
    }


def test_json_is_rows_of_the_agreed_form(
    step: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """In this process; that memory is measured in fresh ones is left to the test below."""
    monkeypatch.setattr(step, "peaks", lambda _: dict.fromkeys(("plain", *step.TIES), 1 << 20))
    step.main([*TINY, "--json"])
    rows = json.loads(capsys.readouterr().out)
    check_rows(rows)
    with pytest.raises(AssertionError):
        check_rows([row | {"met": not row["met"]} for row in rows])
    step.main(TINY)
    table = capsys.readouterr().out
    assert all(row["name"] in table for row in rows)


def test_the_peak_of_a_model_is_measured_in_a_process_of_its_own():
    command = [sys.executable, str(STEP), *TINY, "--peak", "ours (Q, K=V)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 1 << 20


@pytest.mark.long
def test_the_whole_benchmark_runs():
    done = subprocess.run([sys.executable, str(STEP), *TINY, "--json"], capture_output=True, text=True, check=True)
    check_rows(json.loads(done.stdout))


def test_the_comparison_notices_another_function(step: ModuleType, monkeypatch: pytest.MonkeyPatch):
    step.check_same_function(step.SHAPES["tiny"])
    monkeypatch.setattr(step.PlainBlock, "forward", lambda self, x: x + self.out(self.norm_1(x)))
    with pytest.raises(AssertionError):
        step.check_same_function(step.SHAPES["tiny"])


def test_without_a_gpu_the_benchmark_says_so(step: ModuleType, capsys: pytest.CaptureFixture[str]):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit):
        step.main(["--device", "cuda"])
    assert "use --device cpu" in capsys.readouterr().err
