"""A study folder as a runner leaves it, made without training: the numbers are drawn, the format is the real one.

For tests of what reads such folders. ``write_study(folder)`` gives one with all the cases that a reader meets: runs done, running, failed and
pending, two tasks (one scored by loss, one by accuracy), ties and controls, three seeds.
"""

from __future__ import annotations

import json
import math
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from twofold.storage import write_json
from twofold.study.expansion import TaskAnswer, expand
from twofold.study.plan import StudyPlan
from twofold.study.record import PlannedRun, StudyRecord
from twofold.study.tuning import runs
from twofold.task_spec import TaskSpec

PLAN: dict[str, Any] = {
    "name": "synthetic",
    "title": "A study that was not run",
    "question": "Which way should these cache bytes be spent?",
    "reference": "mha",
    "seeds": [0, 1, 2],
    "model": {
        "tie": "(Q, K, V)",
        "architecture": "causal_lm",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "intermediate_size": 128,
    },
    "training": {"steps": 200, "batch_size": 8, "learning_rate": 1e-3},
    "variants": [
        {"name": "mha", "label": "(Q, K, V)"},
        {"name": "kv-tied", "model": {"tie": "(Q, K=V)"}},
        {"name": "qk-tied", "model": {"tie": "(Q=K, V)"}},
        {"name": "one", "model": {"tie": "(Q=K=V)"}},
        {
            "name": "gqa-2",
            "label": "GQA-2",
            "kind": "control",
            "note": "as many cached floats as (Q, K=V)",
            "model": {"num_key_value_heads": 2},
            "matches": [{"variant": "kv-tied", "in": "cache"}],
        },
        {
            "name": "mqa",
            "label": "MQA",
            "kind": "control",
            "note": "half the cached floats of (Q, K=V)",
            "model": {"num_key_value_heads": 1},
        },
    ],
    "tasks": [
        {"name": "bytes", "title": "Bytes of source text", "task": "text", "options": {"context": 64}},
        {"name": "recall", "title": "Associative recall", "task": "recall", "model": {"hidden_size": 64}},
    ],
}


def ask(spec: TaskSpec) -> TaskAnswer:
    """Answers like those of the real tasks."""
    text = spec.name == "text"
    return TaskAnswer(
        model_fields={"architecture": "causal_lm", "vocab_size": 256 if text else 64, "causal": True},
        description="The next byte." if text else "The value that followed the key.",
        loss_metric="bits_per_byte" if text else "loss",
        score="bits_per_byte" if text else "accuracy",
        higher_is_better=not text,
        train_size=10_000,
        tokens_per_example=64,
        data_hash="d" * 64,
    )


def write_study(folder: Path, *, complete: bool = False, plan: dict[str, Any] | None = None) -> StudyPlan:
    """Write the folder. Unless ``complete``, the last seed is under way: one run failed, one is half done, the rest wait."""
    study_plan = StudyPlan.model_validate(plan or PLAN)
    tasks, entries = expand(study_plan, ask)
    provenance = {
        "twofold": "0.1.0", "git_commit": "0" * 40, "code_hash": "c" * 64, "python": "3.11.9", "torch": "2.13.0",
        "transformers": "5.24.0", "accelerate": "1.10.0", "numpy": "2.3.0", "platform": "Linux-6.1-x86_64",
        "hardware": {"cpu": "x86_64", "cores": 2, "memory_gib": 24, "gpus": []}, "workers": 2,
        "command": "twofold study run synthetic", "started_at": "2026-09-01T12:00:00+00:00", "code_changes": [],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    record = StudyRecord(plan=study_plan, code_hash="c" * 64, provenance=provenance, tasks=tasks, entries=entries)
    record.write(folder)
    last_seed = 0
    for planned in record.runs:
        if not complete and planned.seed == study_plan.seeds[-1]:
            last_seed += 1
        state = ("done", "failed", "running", "pending")[min(last_seed, 3)]
        if state != "pending":
            _write_run(planned, folder, state)
    if complete:
        write_later_runs(folder)
    else:
        _hold(folder)
    return study_plan


def write_later_runs(folder: Path) -> None:
    """The runs at the chosen points of tuned axes, done."""
    for planned in runs(StudyRecord.read(folder), folder):
        if not (planned.folder(folder) / "status.json").exists():
            _write_run(planned, folder, "done")


def set_loss(folder: Path, path: str, loss: float) -> None:
    """Give a run that is done another loss at its end."""
    file = folder / "runs" / path / "outcome.json"
    outcome = json.loads(file.read_text())
    scores = (
        {"loss": loss * math.log(2), "bits_per_byte": loss} if "bits_per_byte" in outcome["scores"] else {"loss": loss}
    )
    file.write_text(json.dumps(outcome | {"scores": outcome["scores"] | scores}))


def _hold(folder: Path) -> None:
    """A note as a living runner leaves it, in the name of the test's own process."""
    note = {"pid": os.getpid(), "host": socket.gethostname(), "created": psutil.Process().create_time()}
    (folder / "runner.lock").write_text(json.dumps(note))


def _write_run(planned: PlannedRun, study_folder: Path, state: str) -> None:
    folder = planned.folder(study_folder)
    folder.mkdir(parents=True)
    run = planned.run
    (folder / "run.json").write_text(json.dumps(run.to_dict()))
    draw = np.random.default_rng([planned.seed, *planned.path.encode()])
    tokens_per_step = run.training.batch_size * 64
    steps = run.training.steps if state == "done" else run.training.steps // 2
    floor = 1.0 + 0.3 * draw.random() + 20 / planned.entry.cached_floats_per_token
    lines = []
    for step in range(10, steps + 1, 10):
        loss = floor + 4.0 * math.exp(-step / 40) + 0.02 * draw.standard_normal()
        entry = {"step": step, "tokens": step * tokens_per_step, "seconds": step * 0.01}
        lines.append(entry | {"split": "train", "loss": loss, "learning_rate": 1e-3, "gradient_norm": 1.0})
        if step % 50 == 0:
            lines.append(entry | {"split": "held_out"} | _scores(planned, loss))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status = {"status": state, "error": "The loss is NaN at step 100." if state == "failed" else ""}
    write_json(folder / "status.json", status)
    if state == "done":
        outcome = {
            "scores": _scores(planned, floor), "parameters": planned.entry.parameters, "seconds": steps * 0.01,
            "tokens": steps * tokens_per_step, "cached_floats_per_token": planned.entry.cached_floats_per_token,
            "data_hash": "d" * 64,
        }  # fmt: skip
        (folder / "outcome.json").write_text(json.dumps(outcome))


def _scores(planned: PlannedRun, loss: float) -> dict[str, float]:
    if planned.entry.task.startswith("bytes"):
        return {"loss": loss, "bits_per_byte": loss / math.log(2), "perplexity": math.exp(loss)}
    return {"loss": loss, "accuracy": 1 / (1 + loss)}
