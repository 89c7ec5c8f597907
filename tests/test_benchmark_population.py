"""The benchmark of populations: what it measures, and that it notices another training."""

from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from test_benchmarks import BENCHMARKS, check_rows, goals, loaded

TINY = ["--device", "cpu", "--shape", "tiny", "--rounds", "2"]


@pytest.fixture(scope="module")
def population() -> ModuleType:
    return loaded("population")


class InThisProcess:
    """In place of a process of its own."""

    def __init__(self, name: str, width: int, *, models: int, threads: int) -> None:
        module = loaded("population")
        shape = module.SHAPES[name]
        self.models = max(1, models)
        taker = module.together(shape, models, compiled=False) if models else module.alone(shape, 0, compiled=False)
        self._take = module.stepping(taker)
        self._steps = 1

    def begin(self, steps: int) -> None:
        self._steps = steps

    def wait(self) -> None:
        self._take(self._steps)

    def end(self) -> None:
        pass


def test_processes_are_timed(
    population: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(population, "Process", InThisProcess)
    monkeypatch.setattr(population, "usable_cores", lambda: 2)
    population.main([*TINY, "--json"])
    rows = json.loads(capsys.readouterr().out)
    check_rows(rows)
    assert goals(rows) == {"encoders of width 8, speed, two processes / one process of two threads": ">= 1.3"}
    assert [row["unit"] for row in rows] == ["ratio", "ratio", *["tokens/s"] * 4]
    assert all(row["value"] > 0 for row in rows)


def test_a_process_takes_the_steps_that_it_is_told_to(population: ModuleType):
    process = population.Process("tiny", 8, models=0, threads=1)
    process.wait()
    process.begin(3)
    process.wait()
    # What it cannot read ends it.
    assert process._process.stdin is not None
    process._process.stdin.write("no number\n")
    process._process.stdin.flush()
    with pytest.raises(RuntimeError, match="has ended with code 1"):
        process.wait()
    process.end()


def test_the_comparison_on_a_gpu_is_of_speeds_and_not_of_times(population: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(population, "alone", lambda *_, **__: "alone")
    monkeypatch.setattr(population, "together", lambda *_, **__: "together")
    monkeypatch.setattr(population, "stepping", lambda taker: lambda steps: taker)
    # 256 models in five times the time of one.
    monkeypatch.setattr(population, "seconds_of", lambda take, steps: 0.01 if take(steps) == "alone" else 0.05)
    rows = population.gpu_rows("cuda", 3)
    check_rows(rows)
    assert rows[0]["name"] == "encoders of width 64, speed, population of 256 / one at a time, both compiled"
    assert rows[0]["value"] == pytest.approx(256 / 5)
    assert rows[0]["met"]


def test_another_training_is_noticed(population: ModuleType, monkeypatch: pytest.MonkeyPatch):
    shape = population.SHAPES["tiny"]
    population.check_same_training(shape)
    numbers = population.Stack._numbers
    monkeypatch.setattr(population.Stack, "_numbers", lambda stack, step: numbers(stack, step) * 3)
    with pytest.raises(AssertionError):
        population.check_same_training(shape)


def test_without_a_gpu_or_a_second_core_it_says_so(
    population: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            population.main(["--device", "cuda"])
        assert "use --device cpu" in capsys.readouterr().err
    monkeypatch.setattr(population, "usable_cores", lambda: 1)
    with pytest.raises(SystemExit):
        population.main(TINY)
    assert "this needs two cores" in capsys.readouterr().err


@pytest.mark.long
def test_the_whole_benchmark_runs():
    command = [sys.executable, str(BENCHMARKS / "population.py"), *TINY, "--json"]
    check_rows(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
