"""A study folder read back as tables, at any moment: before the first run ends, while runs go on, and after.

The folder:

    study.json                              the plan, its runs, the facts of its tasks, and where and with what it was begun
    runs/<task>/<variant>/seed-<n>/         one training folder per run: run.json, metrics.jsonl, checkpoints/, outcome.json
    runs/<task>/<variant>/seed-<n>/status.json    {"status": "running" | "done" | "failed", "error": one sentence}

A run without status.json is pending. Needs pandas, and no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

import pandas as pd

from twofold.lock import is_held
from twofold.storage import read_json
from twofold.study.plan import StudyPlan
from twofold.study.record import Entry, PlannedRun, StudyRecord, TaskFacts

__all__ = ["CURVE_COLUMNS", "RUN_COLUMNS", "Results", "Status", "TaskFacts"]

Status = Literal["pending", "running", "done", "failed"]

RUN_COLUMNS = (
    "task", "variant", "label", "tie", "kind", "note", "seed", "status", "error", "parameters", "cached_floats_per_token",
    "cached_bytes_per_token", "seconds", "tokens", "tokens_per_second", "data_hash", "fingerprint",
)  # fmt: skip
ENTRY_COLUMNS = tuple(name for name in RUN_COLUMNS if name in {field.name for field in fields(Entry)})
CURVE_COLUMNS = ("task", "variant", "seed", "step", "tokens", "split", "metric", "value")
CURVE_NUMBERS = {"seed": "int64", "step": "int64", "tokens": "int64", "value": "float64"}
# Keys of a line of metrics.jsonl that are not metrics.
LINE_KEYS = frozenset({"step", "tokens", "seconds", "split"})


@dataclass(frozen=True)
class Results:
    """A study as it stands on disk."""

    folder: Path
    plan: StudyPlan
    provenance: dict[str, Any]
    runs: pd.DataFrame
    curves: pd.DataFrame
    tasks: dict[str, TaskFacts]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a study folder. Raises TwofoldError if it is none, or if study.json cannot be read."""
        folder = Path(folder)
        record = StudyRecord.read(folder)
        alive = is_held(folder)
        rows: list[dict[str, Any]] = []
        points: list[tuple[Any, ...]] = []
        for planned in record.runs:
            rows.append(_row(planned, planned.folder(folder), alive=alive))
            points.extend(_curve(planned, planned.folder(folder)))
        return cls(
            folder=folder,
            plan=record.plan,
            provenance=dict(record.provenance),
            runs=pd.DataFrame(rows, columns=_columns(rows)),
            # Without a single point there are no types to be found out.
            curves=pd.DataFrame(points, columns=list(CURVE_COLUMNS)).astype(CURVE_NUMBERS),
            tasks=dict(record.tasks),
        )

    def by_seed(self, task: str, variant: str, metric: str) -> dict[int, float]:
        """Final value of a held-out metric for each seed whose run is done; what the functions of ``statistics`` take."""
        column = f"score:{metric}"
        if column not in self.runs:
            return {}
        chosen = self.runs[(self.runs.task == task) & (self.runs.variant == variant) & (self.runs.status == "done")]
        return {
            int(seed): float(value)
            for seed, value in zip(chosen.seed, chosen[column], strict=True)
            if math.isfinite(value)
        }


def _row(planned: PlannedRun, folder: Path, *, alive: bool) -> dict[str, Any]:
    status = read_json(folder / "status.json")
    state = status.get("status", "pending")
    if state == "running" and not alive:
        state = "pending"  # whoever ran it is gone; it goes on from its checkpoint when the study is run again
    outcome = read_json(folder / "outcome.json") if state == "done" else {}
    seconds, tokens = outcome.get("seconds", math.nan), outcome.get("tokens", math.nan)
    return {name: getattr(planned.entry, name) for name in ENTRY_COLUMNS} | {
        "seed": planned.seed,
        "fingerprint": planned.fingerprint,
        "status": state,
        "error": status.get("error") or "",
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds else math.nan,
        **{f"score:{metric}": value for metric, value in outcome.get("scores", {}).items()},
    }


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    scores = sorted({name for row in rows for name in row if name not in RUN_COLUMNS})
    return [*RUN_COLUMNS, *scores]


def _curve(planned: PlannedRun, folder: Path) -> Iterator[tuple[Any, ...]]:
    """Rows of CURVE_COLUMNS. A resumed run repeats the steps after its checkpoint: the last line of a step counts."""
    try:
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    last: dict[tuple[int, str], dict[str, Any]] = {}
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the line that is being written
        last[entry["step"], entry["split"]] = entry
    run = (planned.entry.task, planned.entry.variant, planned.seed)
    for (step, split), entry in sorted(last.items()):
        for metric, value in entry.items():
            if metric not in LINE_KEYS and isinstance(value, (int, float)):
                yield *run, step, entry["tokens"], split, metric, float(value)
