"""``twofold harness``: the harness scores a study's own questions as we do, and other tasks on every tie, with chance, error and power."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from twofold.cli import app
from twofold.errors import TwofoldError
from twofold.harness.comparison import StudyModel, compare, study_models
from twofold.harness.questions import harness_name, question_tasks, write_questions
from twofold.harness.scoring import Harness, Score
from twofold.harness.tokenizer import byte_tokenizer
from twofold.storage import write_json
from twofold.study.expansion import expand
from twofold.study.plan import StudyPlan
from twofold.study.record import StudyRecord
from twofold.study.results import Results
from twofold.study.worker import ask
from twofold.training.trainer import train

needs_harness = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)

PLAN = """
name = "asked"
title = "Questions"
question = "Which?"
reference = "three"
seeds = [0, 1]
[model]
tie = "(Q, K, V)"
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 2
head_dim = 8
intermediate_size = 32
positions = { kind = "rotary", rotate = "read" }
[training]
steps = 250
batch_size = 16
learning_rate = 0.01
[[variants]]
name = "three"
[[variants]]
name = "two"
model = { tie = "(Q, K=V)" }
[[tasks]]
name = "follows"
task = "deduction"
options = { train_size = 2_000, held_out_size = 30, chain = 2, max_steps = 1, letters = 5 }
[[tasks]]
name = "reverse"
task = "reverse"
options = { length = 4, train_size = 32, held_out_size = 8 }
training = { steps = 2 }
"""

CHOOSE = """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["a", "b", "c", "d"]
doc_to_target: "{{next}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study folder as a runner leaves it, its runs trained here."""
    folder = tmp_path_factory.mktemp("study")
    plan = StudyPlan.model_validate(tomllib.loads(PLAN))
    facts, entries = expand(plan, ask)
    record = StudyRecord(plan=plan, code_hash="", provenance={}, tasks=facts, entries=entries)
    record.write(folder)
    for planned in record.runs:
        train(planned.run, planned.folder(folder))
        write_json(planned.folder(folder) / "status.json", {"status": "done"})
    return folder


def told(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["harness", *arguments, "--json"], prog_name="twofold")
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@needs_harness
def test_the_harness_scores_a_studys_questions_as_the_study_did(study: Path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[eval]'")
    rows = told(str(study), "--device", "cpu")["rows"]
    results = Results.load(study)
    assert [(row["setting"], row["task"], row["metric"], row["variant"]) for row in rows] == [
        ("follows", "twofold_follows", "exact_match", variant) for variant in ("three", "two")
    ]
    for row in rows:
        own = results.by_seed("follows", row["variant"], "exact_match")
        assert row["seeds"] == len(own) == 2
        assert row["score"] == pytest.approx(sum(own.values()) / 2)
        assert 0 < row["score"] < 1
        assert row["chance"] == pytest.approx(results.tasks["follows"].chance)
        assert row["examples"] == 30
        # Bessel's correction is the harness's.
        wanted = [math.sqrt(share * (1 - share) / 29) for share in own.values()]
        assert row["standard_error"] == pytest.approx(sum(wanted) / 2)
    assert rows[0]["difference"] == 0
    base = results.by_seed("follows", "three", "exact_match")
    tied = results.by_seed("follows", "two", "exact_match")
    assert rows[1]["difference"] == pytest.approx(sum(tied[seed] - base[seed] for seed in base) / 2)


@needs_harness
def test_a_task_of_ones_own_runs_on_every_tie_and_chance_is_told_from_its_choices(study: Path, tmp_path: Path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[eval]'")
    lines = [{"text": f"a>b d>c ?{start}", "next": answer} for start, answer in ("ab", "dc") for _ in range(6)]
    (tmp_path / "choose.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "choose.yaml").write_text(CHOOSE % (tmp_path / "choose.jsonl"))
    arguments = ["harness", str(study), "--only", "follows", "--tasks", "choose", "--include", str(tmp_path)]
    done = CliRunner().invoke(app, arguments, prog_name="twofold")
    assert done.exit_code == 0, done.output
    assert "choose by the models of follows: acc, 12 examples" in done.stdout
    assert "Chance is 0.250." in " ".join(done.stdout.split())
    assert "(Q, K=V)" in done.stdout
    with pytest.raises(TwofoldError, match="nowhere is no folder"):
        Harness(["choose"], tmp_path / "nowhere")


@needs_harness
@pytest.mark.long
def test_a_task_that_the_harness_does_not_have():
    """It takes a minute to find that out: all of the harness's own tasks are read."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[eval]'")
    with pytest.raises(TwofoldError, match="lm-evaluation-harness has no task chose: see"):
        Harness(["chose"])


def test_questions_are_written_as_the_harness_reads_them(tmp_path: Path):
    plan = StudyPlan.model_validate(tomllib.loads(PLAN))
    (setting,) = tasks = question_tasks(plan)
    task = tasks[setting]
    path = write_questions(task, harness_name(setting), tmp_path)
    written = yaml.safe_load(path.read_text())
    assert written["task"] == "twofold_follows"
    assert written["generation_kwargs"] == {"until": ["\n"], "max_gen_toks": 2, "do_sample": False}
    assert written["metadata"]["chance"] == task.chance
    lines = [
        json.loads(line) for line in Path(written["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    ]
    assert [(line["question"], line["answer"], line["kind"]) for line in lines] == [
        (q.prompt, q.answer, q.kind) for q in task.questions
    ]


def test_token_b_is_byte_b():
    tokenizer = byte_tokenizer()
    text = "a\n #1=é€"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    every = list(range(128))
    assert tokenizer.decode(every).encode() == bytes(every)
    assert len(tokenizer) == 256


# What is said of scores


def scored(values: dict[str, list[float]], chance: float | None = 0.5) -> dict[StudyModel, list[Score]]:
    return {
        StudyModel(setting="s", variant=variant, label=variant, seed=seed, folder=Path()): [
            Score(task="t", metric="acc", value=value, error=0.02, examples=500, chance=chance)
        ]
        for variant, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    }


def test_a_score_near_chance_is_no_information_and_one_far_from_it_is():
    rows = {row.variant: row for row in compare(scored({"a": [0.9, 0.91, 0.92], "b": [0.5, 0.51, 0.52], "c": [0.2, 0.6, 0.9], "d": [0.1, 0.1, 0.1]}), "a")}  # fmt: skip
    # "c" has seeds that no guesses explain, however wide its interval.
    assert {name: row.at_chance for name, row in rows.items()} == {"a": False, "b": True, "c": False, "d": True}
    assert not any(row.at_chance for row in compare(scored({"a": [0.5, 0.5]}, chance=None), "a"))
    assert math.isnan(rows["a"].detectable)
    assert math.isnan(
        rows["b"].detectable
    )  # its differences are the same in all seeds: nothing is known of their spread
    assert rows["c"].difference.mean == pytest.approx(sum([-0.7, -0.31, -0.02]) / 3)
    # 5.65 standard errors for three pairs.
    spread = ((-0.7 + 1.03 / 3) ** 2 + (-0.31 + 1.03 / 3) ** 2 + (-0.02 + 1.03 / 3) ** 2) / 2
    assert rows["c"].detectable == pytest.approx(5.653 * math.sqrt(spread / 3), rel=1e-3)


# Mistakes


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["harness", *arguments], prog_name="twofold")
    assert done.exit_code == 2
    return " ".join(done.output.split())


def test_mistakes_get_their_sentences(study: Path, tmp_path: Path):
    assert "holds no study.json" in refused(str(tmp_path))
    assert "has no models of a task 'folows': use one of follows, reverse." in refused(str(study), "--only", "folows")
    assert "asks no questions of its own: name tasks of the harness with --tasks" in refused(str(study), "--only", "reverse")  # fmt: skip
    empty = StudyRecord.read(study)
    empty.write(tmp_path)
    with pytest.raises(TwofoldError, match="holds no trained models: run the study, with keep_models = true"):
        study_models(Results.load(tmp_path))
