"""The commands that train, evaluate and run studies, on models of a few thousand weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from small_study import STUDY
from twofold.cli import app, progress
from twofold.cli.fitting import CPU_VARIABLE, Fitting, computing_on
from twofold.cli.progress import EndedRun, StudyProgressBars, scores_text, time_text
from twofold.cli.run_folder import default_folder, read_run
from twofold.cli.sizes import Sizes
from twofold.cli.train import model_of
from twofold.errors import TwofoldError
from twofold.presets import PRESETS
from twofold.study.progress import RunUnderWay, StudyProgress
from twofold.task_spec import TaskSpec
from twofold.training.progress import Progress
from twofold.training.spec import RunSpec

TINY = ["--layers", "1", "--hidden-size", "16", "--heads", "2", "--steps", "12", "--batch-size", "8", "--device", "cpu"]
REVERSE = ["--task", "reverse", "--option", "length=5", "--option", "train_size=64", "--option", "held_out_size=32"]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), prog_name="twofold")


def lines_of(done: Result) -> list[dict]:
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "reverse"
    done = invoke("train", *REVERSE, *TINY, "--tie", "(Q, K=V)", "--folder", str(folder))
    assert done.exit_code == 0, done.output
    assert done.stderr == ""  # no bar where nobody watches
    return folder


# Training


def test_a_run_ends_with_its_scores_and_where_the_model_is(run_folder: Path):
    again = invoke("train", *REVERSE, *TINY, "--tie", "(Q, K=V)", "--folder", str(run_folder))
    outcome = json.loads((run_folder / "outcome.json").read_text())
    shown = dict(line.split(maxsplit=1) for line in again.stdout.splitlines())
    assert float(shown["accuracy"]) == pytest.approx(outcome["scores"]["accuracy"], abs=1e-4)
    assert shown["parameters"].strip() == f"{outcome['parameters']:,}"
    assert shown["cache"].strip() == f"{2 * outcome['cached_floats_per_token']} bytes per token (bf16)"
    assert (run_folder / "model" / "config.json").is_file()
    assert read_run(run_folder).model.tie.tie(0).cached_tensors == 1


def test_json_is_a_line_for_each_report_and_the_outcome_last(tmp_path: Path):
    fields = ["--training-field", "log_every=4", "--evaluate-every", "6"]
    lines = lines_of(invoke("train", *REVERSE, *TINY, *fields, "--folder", str(tmp_path / "run"), "--json"))
    assert [line["event"] for line in lines] == ["progress"] * (len(lines) - 1) + ["outcome"]
    assert [line["step"] for line in lines[:-1]] == [4, 6, 8, 12]
    assert [bool(line["scores"]) for line in lines[:-1]] == [False, True, False, True]
    assert lines[-1]["model"] == str(tmp_path / "run" / "model")
    assert lines[-1]["scores"] == lines[-2]["scores"]


def test_the_folder_alone_resumes(tmp_path: Path, run_folder: Path):
    """A run that was stopped: its run.json is there, and nothing else."""
    (tmp_path / "run.json").write_text((run_folder / "run.json").read_text())
    last = lines_of(invoke("train", "--folder", str(tmp_path), "--device", "cpu", "--json"))[-1]
    assert last["scores"] == json.loads((run_folder / "outcome.json").read_text())["scores"]


def test_settings_have_a_folder_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    folders = {
        lines_of(invoke("train", *REVERSE, *TINY, "--seed", seed, "--steps", "1", "--json"))[-1]["folder"]
        for seed in "010"
    }
    assert len(folders) == 2
    assert all(Path(folder).is_dir() and Path(folder).parent == Path("runs") for folder in folders)
    assert default_folder(read_run(Path(min(folders)))) == Path(min(folders))


def test_every_option_reaches_the_run(tmp_path: Path):
    folder = tmp_path / "run"
    done = invoke(
        "train", *REVERSE, "--tie", "(Q=K, V)", "--folder", str(folder), "--preset", "tiny", "--layers", "1",
        "--hidden-size", "24", "--heads", "3", "--head-dim", "4", "--mlp-size", "10", "--model-field", "dropout=0.25",
        "--model-field", 'positions={"kind": "none"}', "--steps", "2", "--batch-size", "6", "--accumulation-steps", "3",
        "--learning-rate", "0.01", "--schedule", "constant_with_decay", "--warmup-steps", "1", "--weight-decay", "0.5",
        "--evaluate-every", "1", "--checkpoint-every", "2", "--training-field", "clip_norm=0", "--seed", "7", "--device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    run = read_run(folder)
    model, training = run.model, run.training
    assert (str(model.tie), model.num_hidden_layers, model.hidden_size) == ("(Q=K, V)", 1, 24)
    assert (model.num_attention_heads, model.num_key_value_heads, model.head_dim) == (3, 3, 4)
    assert (model.intermediate_size, model.dropout, model.positions.kind, run.seed) == (10, 0.25, "none", 7)
    assert (training.steps, training.batch_size, training.accumulation_steps) == (2, 6, 3)
    assert (training.learning_rate, training.schedule, training.warmup_steps) == (0.01, "constant_with_decay", 1)
    assert (training.weight_decay, training.evaluate_every, training.checkpoint_every) == (0.5, 1, 2)
    assert (training.clip_norm, run.task.options["length"]) == (0, 5)


def test_warmup_follows_the_steps_unless_it_is_given():
    assert Fitting(steps=50).spec().warmup_steps == 5
    assert Fitting(steps=50, warmup_steps=0).spec().warmup_steps == 0


def test_what_the_task_dictates_wins():
    dictated = {"architecture": "token_classification", "vocab_size": 10, "num_labels": 10, "causal": False}
    model = model_of(PRESETS["tiny"], Sizes(layers=2), dictated, {"qk_norm": True})
    assert (model.vocab_size, model.num_labels, model.causal) == (10, 10, False)
    assert (model.num_hidden_layers, model.qk_norm, model.norm) == (2, True, "rmsnorm")
    with pytest.raises(TwofoldError, match="vocab_size=7 contradicts"):
        model_of(PRESETS["tiny"], Sizes(), dictated, {"vocab_size": 7})
    with pytest.raises(TwofoldError, match="dropout is 'much'"):
        model_of(PRESETS["tiny"], Sizes(), dictated, {"dropout": "much"})


def test_the_place_of_computation_is_set_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(CPU_VARIABLE, raising=False)
    with computing_on("cpu") as place:
        assert (place.type, os.environ[CPU_VARIABLE]) == ("cpu", "true")
    assert CPU_VARIABLE not in os.environ
    monkeypatch.setenv(CPU_VARIABLE, "false")
    with pytest.raises(ZeroDivisionError), computing_on("cpu"):
        _ = 1 / 0
    assert os.environ[CPU_VARIABLE] == "false"


def test_a_terminal_gets_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # by which Rich takes any output for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    done = invoke("train", *REVERSE, *TINY, "--evaluate-every", "6", "--folder", str(tmp_path / "run"))
    assert done.exit_code == 0, done.output
    assert "12/12" in done.stderr
    assert "tokens/s" in done.stderr
    assert "step 6: accuracy" in done.stderr
    assert "tokens/s" not in done.stdout


# Evaluation


def test_eval_gives_the_scores_of_the_run(run_folder: Path):
    told = json.loads(invoke("eval", str(run_folder), "--device", "cpu", "--json").stdout)
    outcome = json.loads((run_folder / "outcome.json").read_text())
    assert told["scores"] == pytest.approx(outcome["scores"], rel=1e-5)
    assert told["data_hash"] == outcome["data_hash"]
    assert told["held_out_size"] == 32
    shown = invoke("eval", str(run_folder), "--device", "cpu", "--batch-size", "5")
    assert shown.exit_code == 0, shown.output
    assert f"{outcome['scores']['accuracy']:.4f}" in shown.stdout


def test_eval_on_other_data(run_folder: Path):
    other = json.loads(
        invoke("eval", str(run_folder), "--option", "held_out_size=77", "--device", "cpu", "--json").stdout
    )
    assert other["held_out_size"] == 77
    assert other["task"]["options"]["length"] == 5
    sort = ["--task", "sort", "--option", "length=5", "--option", "train_size=8", "--option", "held_out_size=16"]
    told = json.loads(invoke("eval", str(run_folder), *sort, "--device", "cpu", "--json").stdout)
    assert (told["task"]["name"], told["held_out_size"]) == ("sort", 16)


# Studies


def test_a_study_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("mini.toml").write_text(STUDY)
    done = invoke("study", "run", "mini.toml", "--workers", "2")
    assert done.exit_code == 0, done.output
    *_, counted, page = done.stdout.splitlines()
    assert counted.startswith("4 of 4 runs done, in ")
    assert Path(page.removeprefix("Report: ")) == Path("studies/mini/report/index.html")
    assert Path("studies/mini/report/index.html").is_file()
    ended = sorted(line.split(":")[0] for line in done.stderr.splitlines())
    assert ended == sorted(f"done reverse/{variant}/seed-{seed}" for variant in ("free", "tied") for seed in (0, 1))
    study = json.loads(Path("studies/mini/study.json").read_text())
    assert study["provenance"]["command"] == "twofold study run mini.toml --workers 2"
    again = lines_of(invoke("study", "run", "mini.toml", "--json"))
    assert [line["event"] for line in again] == ["finished"]
    assert (again[0]["done"], again[0]["failed"]) == (4, 0)


def test_a_failed_run_is_told_and_is_1(tmp_path: Path):
    plan, folder = tmp_path / "mini.toml", tmp_path / "study"
    plan.write_text(
        STUDY.replace("learning_rate = 1e-3", "learning_rate = 1e30").replace("seeds = [0, 1]", "seeds = [0]")
    )
    done = invoke("study", "run", str(plan), "--folder", str(folder), "--workers", "1", "--only", "tied", "--json")
    assert done.exit_code == 1, done.output
    run, finished = (json.loads(line) for line in done.stdout.splitlines())
    assert (run["event"], run["path"], run["status"]) == ("run", "reverse/tied/seed-0", "failed")
    assert run["error"].endswith(".")
    assert (finished["done"], finished["failed"]) == (0, 1)
    assert Path(finished["page"]).is_file()


def test_the_bars_of_a_study_follow_its_runs(tmp_path: Path):
    ended: list[EndedRun] = []
    for path, status in (("a/b/seed-0", "done"), ("a/c/seed-0", "failed")):
        folder = tmp_path / "runs" / path
        folder.mkdir(parents=True)
        (folder / "status.json").write_text(
            json.dumps({"status": status, "error": "NaN." if status == "failed" else ""})
        )
    (tmp_path / "runs/a/b/seed-0/outcome.json").write_text(json.dumps({"scores": {"loss": 0.5}}))

    def now(*paths: str, done: int = 0, failed: int = 0) -> StudyProgress:
        step = Progress(step=1, steps=4, tokens=8, loss=2.0, seconds=1.0, tokens_per_second=8.0, seconds_left=3.0)
        under_way = tuple(RunUnderWay(path=path, progress=step) for path in paths)
        return StudyProgress(
            phase="training",
            done=done,
            failed=failed,
            total=2,
            under_way=under_way,
            seconds_elapsed=1.0,
            seconds_left=None,
        )

    with StudyProgressBars("study", tmp_path, ended=ended.append) as bars:
        bars.report(now("a/b/seed-0", "a/c/seed-0"))
        assert not ended
        bars.report(now("a/c/seed-0", done=1))
        bars.report(now(done=1, failed=1))
    assert [(run.path, run.status) for run in ended] == [("a/b/seed-0", "done"), ("a/c/seed-0", "failed")]
    assert [str(run) for run in ended] == ["a/b/seed-0: loss 0.5000", "a/c/seed-0: NaN."]
    assert bars.last.failed == 1


def test_words():
    assert [time_text(s) for s in (0.04, 9.96, 42.2, 200, 7500)] == ["0.0 s", "10 s", "42 s", "3 min 20 s", "2 h 5 min"]
    assert scores_text({"loss": 0.5, "bits_per_byte": 0.25}) == "bits per byte 0.2500, loss 0.5000"
    step = Progress(step=1, steps=4, tokens=8, loss=2.0, seconds=1.0, tokens_per_second=12345.6, seconds_left=90.0)
    assert progress.told(step) == "loss 2.000 · 12.3K tokens/s · 1 min 30 s left"


def test_a_run_is_named_by_its_settings():
    run = RunSpec(task=TaskSpec(name="sort"), model=PRESETS["tiny"], training=Fitting().spec(), seed=0)
    assert default_folder(run).name == f"sort-{run.fingerprint[:8]}"
