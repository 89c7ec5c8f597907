"""Several processes that train together are one process: the same weights, the same scores, one set of files."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from training_fixture import Nursery, make_run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery()
    yield nursery
    nursery.close()


def together(nursery: Nursery, run, folder: Path, processes: int) -> list[int]:
    """Carry out a run in a group of processes, as ``accelerate launch`` would start them; what each ends with."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    started = [
        nursery.start(run, folder, environment=group | sizes | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    return [nursery.wait(process) for process in started]


def compare(one: Path, other: Path) -> None:
    weights = load_file(one / "model" / "model.safetensors")
    for name, tensor in load_file(other / "model" / "model.safetensors").items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-6, msg=name)
    frames = [pd.read_json(folder / "metrics.jsonl", lines=True).drop(columns="seconds") for folder in (one, other)]
    pd.testing.assert_frame_equal(*frames, check_exact=False, rtol=1e-4)
    outcomes = [json.loads((folder / "outcome.json").read_text()) for folder in (one, other)]
    assert outcomes[0]["scores"] == pytest.approx(outcomes[1]["scores"], rel=1e-4)


# Parts of 4 and of 2 examples, all with different numbers of predictions; the last batch held out is met by one process alone.
RUN = make_run(
    steps=5, accumulation_steps=2, evaluate_every=2, checkpoint_every=2, learning_rate=1e-3, model={"dropout": 0.0}
)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_are_one_process(nursery, tmp_path, processes):
    assert nursery.carry_out(RUN, tmp_path / "one") == 0
    assert together(nursery, RUN, tmp_path / "many", processes) == [0] * processes
    compare(tmp_path / "one", tmp_path / "many")
    assert sorted(path.name for path in (tmp_path / "many" / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000005",
    ]


def test_the_comparison_can_fail(nursery, tmp_path):
    assert nursery.carry_out(RUN, tmp_path / "one") == 0
    other = make_run(**{**vars(RUN.training), "accumulation_steps": 1, "learning_rate": 1.1e-3}, model={"dropout": 0.0})
    assert nursery.carry_out(other, tmp_path / "other") == 0
    with pytest.raises(AssertionError):
        compare(tmp_path / "one", tmp_path / "other")


def test_processes_go_on_where_one_was_killed(nursery, tmp_path):
    """And the other way round: what lies in the folder does not say how many wrote it."""
    assert nursery.carry_out(RUN, tmp_path / "one") == 0
    assert nursery.carry_out(RUN, tmp_path / "mixed", dies_at=30) != 0
    assert together(nursery, RUN, tmp_path / "mixed", 2) == [0, 0]
    compare(tmp_path / "one", tmp_path / "mixed")


def test_a_batch_that_does_not_split_is_told(nursery, tmp_path, capfd):
    run = make_run(batch_size=6, accumulation_steps=2)
    assert together(nursery, run, tmp_path / "run", 2) == [1, 1]
    assert not (tmp_path / "run").exists()
