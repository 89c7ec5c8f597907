"""train(): what it leaves in its folder, what it tells, what it refuses, and that nothing saved is ever lost."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from training_fixture import Progressions, Unsteady, make_run
from twofold import storage
from twofold.cost import cached_floats_per_token, parameters
from twofold.errors import TwofoldError
from twofold.lock import FolderLock
from twofold.models import load_model
from twofold.training import checkpoint
from twofold.training.evaluation import evaluate
from twofold.training.schedule import learning_rate
from twofold.training.spec import RunSpec
from twofold.training.trainer import Outcome, train


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in (folder / "checkpoints").glob("step-*"))


# What a run leaves


def test_a_run_and_what_it_leaves(tmp_path):
    run = make_run(steps=7, evaluate_every=3, checkpoint_every=2)
    seen = []
    outcome = train(run, tmp_path / "run", task=Progressions(), report=seen.append)
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints", "metrics.jsonl", "model", "outcome.json", "run.json", "runner.lock",
    ]  # fmt: skip
    assert RunSpec.from_dict(json.loads((folder / "run.json").read_text())) == run
    assert Outcome.from_dict(json.loads((folder / "outcome.json").read_text())) == outcome
    assert saved_steps(folder) == [6, 7]
    assert outcome.parameters == parameters(run.model)
    assert outcome.cached_floats_per_token == cached_floats_per_token(run.model)
    assert outcome.tokens == 7 * 8 * 12
    assert outcome.data_hash == Progressions().data_hash
    assert outcome.scores == pytest.approx(evaluate(load_model(folder / "model"), Progressions(), batch_size=10))

    assert [progress.step for progress in seen] == [2, 3, 4, 6, 7]
    assert [bool(progress.scores) for progress in seen] == [False, True, False, True, True]
    assert all(progress.steps == 7 and progress.tokens == progress.step * 96 for progress in seen)
    assert all(progress.tokens_per_second > 0 and math.isfinite(progress.loss) for progress in seen)
    assert seen[-1].seconds_left == 0 < seen[0].seconds_left
    assert seen[-1].scores == outcome.scores

    frame = pd.read_json(folder / "metrics.jsonl", lines=True)
    trained = frame[frame.split == "train"]
    assert trained.step.tolist() == [2, 4, 6, 7]
    rates = [learning_rate(run.training, step) for step in (2, 4, 6, 7)]
    assert trained.learning_rate.tolist() == pytest.approx(rates)
    assert (trained.gradient_norm > 0).all()
    assert trained.loss.tolist()[-1] == pytest.approx(seen[-1].loss)
    held_out = frame[frame.split == "held_out"]
    assert held_out.step.tolist() == [3, 6, 7]
    assert held_out.accuracy.tolist()[-1] == pytest.approx(outcome.scores["accuracy"])
    assert frame.seconds.is_monotonic_increasing
    assert (frame.tokens == frame.step * 96).all()


def test_it_learns(tmp_path):
    run = make_run(steps=60, learning_rate=3e-2, log_every=20, model={"dropout": 0.0})
    losses = []
    train(run, tmp_path, task=Progressions(train_size=16), report=lambda progress: losses.append(progress.loss))
    assert losses[-1] < 0.6 * losses[0]


def test_a_checkpoint_is_a_model(tmp_path):
    train(make_run(steps=2), tmp_path, task=Progressions())
    saved = load_model(tmp_path / "checkpoints" / "step-00000002")
    final = load_model(tmp_path / "model")
    assert same(dict(saved.state_dict()), dict(final.state_dict()))
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    run = make_run(steps=2)
    with FolderLock(tmp_path), pytest.raises(TwofoldError, match=r"is being run by process \d+"):
        train(run, tmp_path, task=Progressions())
    assert not (tmp_path / "metrics.jsonl").exists()
    assert train(run, tmp_path, task=Progressions()).tokens == 2 * 8 * 12


def test_a_finished_run_is_not_repeated(tmp_path):
    first = train(make_run(steps=2), tmp_path, task=Progressions())
    told = []
    assert train(make_run(steps=2), tmp_path, task=Progressions(), report=told.append) == first
    assert not told


def test_training_leaves_the_caller_its_random_numbers(tmp_path):
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    train(make_run(steps=2), tmp_path, task=Progressions())
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.filterwarnings("ignore::UserWarning")  # the compiler looks at gradients of tensors that have none
def test_a_compiled_model_trains_alike(tmp_path, monkeypatch):
    """With the backend that only traces: the code that inductor makes is its own affair."""
    compiled = []
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or real(model, backend="eager"))
    run = make_run(steps=3, model={"dropout": 0.0})
    for name in (False, True):
        train(run, tmp_path / str(name), task=Progressions(), compile_model=name)
    assert len(compiled) == 1
    for name, tensor in weights(tmp_path / "False").items():
        torch.testing.assert_close(weights(tmp_path / "True")[name], tensor, rtol=1e-4, atol=1e-5)


def test_one_process_trains_in_one_precision_after_another(tmp_path):
    for number, precision in enumerate(("no", "bf16", "no")):
        train(make_run(steps=2, precision=precision), tmp_path / str(number), task=Progressions())
    assert same(weights(tmp_path / "0"), weights(tmp_path / "2"))
    assert not same(weights(tmp_path / "0"), weights(tmp_path / "1"))


def test_tensorboard_gets_the_same_numbers(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(make_run(steps=4), tmp_path, task=Progressions(), tensorboard=True)
    board = events.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    frame = pd.read_json(tmp_path / "metrics.jsonl", lines=True)
    wanted = frame[frame.split == "train"].loss.tolist()
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(wanted)


def test_tensorboard_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TwofoldError, match=r"pip install 'twofold\[tensorboard\]'"):
        train(make_run(), tmp_path, task=Progressions(), tensorboard=True)


# Going on


class Stop(Exception):  # noqa: N818
    pass


def stop_at(step: int, error: type[BaseException] = Stop):
    def report(progress):
        if progress.step >= step:
            raise error

    return report


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_an_interrupted_run_goes_on(tmp_path, error):
    run = make_run(steps=8, checkpoint_every=3, evaluate_every=4)
    train(run, tmp_path / "whole", task=Progressions())
    with pytest.raises(error):
        train(run, tmp_path / "run", task=Progressions(), report=stop_at(6, error))
    assert saved_steps(tmp_path / "run") == [3, 6]
    seen = []
    train(run, tmp_path / "run", task=Progressions(), report=seen.append)
    assert [progress.step for progress in seen] == [8]
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_without_intermediate_checkpoints_a_run_begins_again(tmp_path):
    run = make_run(steps=6)
    with pytest.raises(Stop):
        train(run, tmp_path, task=Progressions(), report=stop_at(4))
    assert not saved_steps(tmp_path)
    train(run, tmp_path, task=Progressions())
    assert saved_steps(tmp_path) == [6]
    assert pd.read_json(tmp_path / "metrics.jsonl", lines=True).step.tolist() == [2, 4, 6, 6]


def test_time_adds_up_over_resumptions(tmp_path):
    run = make_run(steps=6, checkpoint_every=2)
    with pytest.raises(Stop):
        train(run, tmp_path, task=Progressions(), report=stop_at(4))
    before = json.loads((tmp_path / "checkpoints" / "step-00000004" / "state.json").read_text())["seconds"]
    assert train(run, tmp_path, task=Progressions()).seconds > before > 0


def test_damaged_checkpoints(tmp_path, caplog):
    run = make_run(steps=8, checkpoint_every=2)
    train(run, tmp_path / "whole", task=Progressions())
    with pytest.raises(Stop):
        train(run, tmp_path / "run", task=Progressions(), report=stop_at(6))
    old, new = (tmp_path / "run" / "checkpoints" / f"step-0000000{step}" for step in (4, 6))
    os.truncate(new / "model.safetensors", 200)
    shutil.copytree(tmp_path / "run", tmp_path / "worse")
    train(run, tmp_path / "run", task=Progressions())
    assert "step-00000006 is damaged" in caplog.text
    assert saved_steps(tmp_path / "run") == [6, 8]
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    (tmp_path / "worse" / "checkpoints" / old.name / "optimizer.safetensors").unlink()
    with pytest.raises(TwofoldError, match=r"No checkpoint in .*worse.checkpoints is whole \(.*\): remove"):
        train(run, tmp_path / "worse", task=Progressions())


# What is refused


def test_another_run_is_not_continued(tmp_path):
    train(make_run(steps=2), tmp_path, task=Progressions())
    with pytest.raises(
        TwofoldError, match=r"holds another run \(training.steps is 2 there and 3 here\): choose another"
    ):
        train(make_run(steps=3), tmp_path, task=Progressions())
    with pytest.raises(TwofoldError, match=r"model.tie is .*; seed is .* and 1 more\)"):
        train(make_run(steps=3, seed=4, model={"tie": "(Q, K, V)"}), tmp_path, task=Progressions())


def test_other_data_are_not_mixed_in(tmp_path):
    run = make_run(steps=4, checkpoint_every=2)
    with pytest.raises(Stop):
        train(run, tmp_path, task=Progressions(), report=stop_at(2))
    with pytest.raises(TwofoldError, match=r"step 2 in .* was made with other data: bring back"):
        train(run, tmp_path, task=Progressions(train_size=39))


def test_a_folder_of_nobody_knows_what(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(TwofoldError, match=r"holds metrics.jsonl but no run.json"):
        train(make_run(), tmp_path, task=Progressions())
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(TwofoldError, match=r"run.json cannot be read .*: choose another folder"):
        train(make_run(), tmp_path, task=Progressions())


def test_a_folder_may_hold_other_things(tmp_path):
    (tmp_path / "status.json").write_text("{}")
    train(make_run(steps=1), tmp_path, task=Progressions())


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"vocab_size": 16}, "vocab_size"), ({"architecture": "token_classification", "num_labels": 17}, "architecture")],
)
def test_a_model_that_does_not_fit_the_task(tmp_path, fields, name):
    with pytest.raises(TwofoldError, match=f"progressions needs a model of {name}"):
        train(make_run(model=fields), tmp_path / "run", task=Progressions())
    assert not (tmp_path / "run").exists()


def test_a_larger_vocabulary_fits(tmp_path):
    train(make_run(steps=1, model={"vocab_size": 20}), tmp_path, task=Progressions())


# What goes wrong on the way


def test_a_loss_that_is_no_number_names_step_and_batch(tmp_path):
    run = make_run(steps=9, checkpoint_every=2, log_every=4)
    train(run, tmp_path / "whole", task=Progressions())
    with pytest.raises(
        TwofoldError, match=r"The loss is nan at step 7, on the batch of places 48 to 55 .*: lower"
    ) as told:
        train(run, tmp_path / "run", task=Unsteady(bad_call=7))
    order = torch.Generator().manual_seed(seed_of_epoch(run.seed, 1))
    expected = torch.randperm(40, generator=order)[8:16].tolist()
    assert f"(examples {', '.join(map(str, expected))})" in str(told.value)
    assert saved_steps(tmp_path / "run") == [4, 6]
    train(run, tmp_path / "run", task=Progressions())
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def seed_of_epoch(seed: int, epoch: int) -> int:
    """The seed of an epoch's order, said once more."""
    digest = hashlib.sha256(f"data order:{seed}:{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def test_weights_that_explode_are_never_saved(tmp_path):
    run = make_run(steps=30, log_every=30, checkpoint_every=10, learning_rate=1e38, clip_norm=0)
    with pytest.raises(TwofoldError, match=r"is (nan|inf) at step 2, on the batch of places 8 to 15 "):
        train(run, tmp_path, task=Progressions())
    assert not saved_steps(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("place", ["file/run", "file/deep/run"])
def test_an_unwritable_folder_is_told(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(TwofoldError, match=r"run cannot be written to \(.*\): .* give another folder"):
        train(make_run(), tmp_path / place, task=Progressions())


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("kilobytes", [4, 20, 40, 60, 80])
def test_a_full_disk(tmp_path, small_disk, kilobytes):
    """It fills up after the first checkpoint, leaving room for more or less of the second."""
    run = make_run(steps=8, checkpoint_every=2, evaluate_every=2)
    train(run, tmp_path / "whole", task=Progressions())
    filler = small_disk / "filler"

    def fill(progress):
        if progress.step == 2:
            room = os.statvfs(small_disk)
            filler.write_bytes(bytes(max(0, room.f_bavail * room.f_frsize - 1024 * kilobytes)))

    with pytest.raises(TwofoldError, match=r"cannot be written to \(.*No space left.*\): what was saved .* make room"):
        train(run, small_disk / "run", task=Progressions(), report=fill)
    assert 2 <= saved_steps(small_disk / "run")[-1] < 8
    assert not list((small_disk / "run" / "checkpoints").glob(".*"))
    filler.unlink()
    shutil.move(small_disk / "run", tmp_path / "run")
    train(run, tmp_path / "run", task=Progressions())
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("part", ["tensors", "state", "log"])
def test_a_disk_that_is_full_for_one_part(tmp_path, monkeypatch, part):
    run = make_run(steps=6, checkpoint_every=2)
    train(run, tmp_path / "whole", task=Progressions())

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(progress):
        if progress.step == 2:
            homes = {
                "tensors": (checkpoint, "save_file"),
                "state": (checkpoint, "write_json"),
                "log": (storage.os, "fsync"),
            }
            monkeypatch.setattr(*homes[part], full)

    with pytest.raises(TwofoldError, match=r"No space left"):
        train(run, tmp_path / "run", task=Progressions(), report=fill)
    assert saved_steps(tmp_path / "run") == [2]
    monkeypatch.undo()
    train(run, tmp_path / "run", task=Progressions())
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
