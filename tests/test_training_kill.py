"""A run that is killed, with SIGKILL and anywhere, ends with bitwise the weights of one that is not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from safetensors import SafetensorError

from training_fixture import Nursery, make_run
from twofold.training.checkpoint import Checkpoint

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork and no SIGKILL")

# Dropout is on (see the fixture); neither cadence divides the other, so a checkpoint falls between the lines of the log.
RUN = make_run(steps=9, log_every=4, evaluate_every=3, checkpoint_every=2, accumulation_steps=2)
ENOUGH = 10_000


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def uninterrupted(nursery, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert nursery.carry_out(RUN, folder) == 0
    return folder


def read(folder: Path) -> dict[str, object]:
    """All that two runs must have in common, bit by bit: everything but the time they took."""
    outcome = json.loads((folder / "outcome.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for values in (outcome, *lines):
        del values["seconds"]
    last = folder / "checkpoints" / f"step-{RUN.training.steps:08d}"
    files = (folder / "model" / "model.safetensors", last / "model.safetensors", last / "optimizer.safetensors")
    names = sorted(path.name for path in folder.rglob("*"))
    return {
        "outcome": outcome,
        "lines": lines,
        "names": names,
        **{str(path.relative_to(folder)): path.read_bytes() for path in files},
    }


def file_events(nursery: Nursery, folder: Path) -> int:
    """How many things a whole run does to files."""
    low, high = 1, 1
    while nursery.carry_out(RUN, folder / f"{high}", dies_at=high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if nursery.carry_out(RUN, folder / f"{middle}", dies_at=middle) else (low, middle)
    return low


def test_two_runs_agree(nursery, uninterrupted, tmp_path):
    """What the rest of this file stands on."""
    assert nursery.carry_out(RUN, tmp_path / "run") == 0
    assert read(tmp_path / "run") == read(uninterrupted)
    assert [path.name for path in sorted((uninterrupted / "checkpoints").iterdir())] == [
        "step-00000008",
        "step-00000009",
    ]


def test_the_comparison_can_fail(nursery, uninterrupted, tmp_path):
    other = make_run(
        seed=1,
        **{
            name: getattr(RUN.training, name)
            for name in ("steps", "log_every", "evaluate_every", "checkpoint_every", "accumulation_steps")
        },
    )
    assert nursery.carry_out(other, tmp_path / "run") == 0
    assert read(tmp_path / "run")["model/model.safetensors"] != read(uninterrupted)["model/model.safetensors"]


def die_everywhere(nursery: Nursery, folder: Path, wanted: dict[str, object], moments: list[int]) -> None:
    for moment in moments:
        run_folder = folder / f"at-{moment}"
        assert nursery.carry_out(RUN, run_folder, dies_at=moment) == -signal.SIGKILL
        # Again on the way: what is resumed can be killed as well.
        nursery.carry_out(RUN, run_folder, dies_at=1 + moment // 2)
        assert nursery.carry_out(RUN, run_folder) == 0
        assert read(run_folder) == wanted, f"killed at its {moment}th file"


def test_killed_between_any_two_things_it_does_to_files(nursery, uninterrupted, tmp_path):
    """Moments in the making of a folder, within a checkpoint, between its parts, in the removal of an old one, at the end."""
    events = file_events(nursery, tmp_path)
    assert events > 50
    die_everywhere(nursery, tmp_path, read(uninterrupted), random.Random(0).sample(range(1, events + 1), 8))


@pytest.mark.long
def test_killed_between_each_two_things_it_does_to_files(nursery, uninterrupted, tmp_path):
    die_everywhere(nursery, tmp_path, read(uninterrupted), list(range(1, file_events(nursery, tmp_path) + 1)))


def test_killed_at_random_moments_again_and_again(nursery, uninterrupted, tmp_path):
    """The clock, unlike a file, also strikes within a step and within a write."""
    began = time.monotonic()
    assert nursery.carry_out(RUN, tmp_path / "whole") == 0
    seconds = time.monotonic() - began
    draw, kills = random.Random(1), 0
    for number in range(3):
        folder = tmp_path / f"run-{number}"
        for _ in range(3):
            process = nursery.start(RUN, folder)
            time.sleep(seconds * draw.uniform(0.1, 0.9))
            os.kill(process, signal.SIGKILL)
            kills += nursery.wait(process) == -signal.SIGKILL
        assert nursery.carry_out(RUN, folder) == 0
        assert read(folder) == read(uninterrupted)
    assert kills > 2


def test_killed_while_a_checkpoint_is_written(nursery, uninterrupted, tmp_path):
    folder, struck = tmp_path / "run", 0
    for step in (2, 4, 6):
        process = nursery.start(RUN, folder)
        partial = folder / "checkpoints" / f".step-{step:08d}.{process}.partial"
        deadline = time.monotonic() + 20
        while not partial.exists() and time.monotonic() < deadline:
            pass
        os.kill(process, signal.SIGKILL)
        nursery.wait(process)
        struck += partial.exists()
    assert struck > 0
    assert nursery.carry_out(RUN, folder) == 0
    assert read(folder) == read(uninterrupted)


def test_a_truncated_checkpoint_is_passed_over(nursery, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    assert nursery.carry_out(RUN, folder) == 0
    (folder / "outcome.json").unlink()
    shutil.rmtree(folder / "model")
    whole, damaged = sorted((folder / "checkpoints").iterdir())
    for name, size in (("optimizer.safetensors", 100), ("state.json", 10), ("model.safetensors", 0)):
        os.truncate(damaged / name, size)
        with pytest.raises((SafetensorError, ValueError)):
            Checkpoint.read(damaged)
    assert Checkpoint.read(whole).state.step == 8
    assert nursery.carry_out(RUN, folder) == 0
    assert read(folder) == read(uninterrupted)


def test_pandas_reads_the_metrics_of_a_resumed_run(nursery, uninterrupted):
    frame = pd.read_json(uninterrupted / "metrics.jsonl", lines=True)
    assert frame[frame.split == "train"].step.tolist() == [4, 8, 9]
    assert frame[frame.split == "held_out"].step.tolist() == [3, 6, 9]
    assert frame[frame.split == "train"].loss.notna().all()
