"""A study folder read back as tables, at any moment: before the first run ends, while runs go on, and after.

The folder:

    study.json                              the plan, its runs, the facts of its tasks, and where and with what it was begun
    runs/<task>/<variant>/seed-<n>/         one training folder per run: run.json, metrics.jsonl, checkpoints/, outcome.json
    runs/<task>/<variant>/seed-<n>/status.json    {"status": "running" | "done" | "failed", "error": one sentence}

A run without status.json is pending. The runs of tuned axes are all there, told apart by ``purpose``: "result" for what enters the numbers of a
report, "tuning" for what only serves to choose. Needs pandas, and no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

import pandas as pd

from twofold.lock import is_held
from twofold.storage import read_json
from twofold.study.plan import StudyPlan
from twofold.study.record import Entry, PlannedRun, StudyRecord, TaskFacts
from twofold.study.tuning import Choice, contests, runs

__all__ = ["CURVE_COLUMNS", "RUN_COLUMNS", "Results", "Status", "TaskFacts"]

Status = Literal["pending", "running", "done", "failed"]

RUN_COLUMNS = (
    "task", "variant", "label", "tie", "kind", "note", "seed", "status", "error", "parameters", "cached_floats_per_token",
    "cached_bytes_per_token", "seconds", "tokens", "tokens_per_second", "data_hash", "data_order", "fingerprint", "seed_shift", "purpose",
)  # fmt: skip
ENTRY_COLUMNS = tuple(name for name in RUN_COLUMNS if name in {part.name for part in fields(Entry)})
CURVE_COLUMNS = ("task", "variant", "seed", "step", "tokens", "split", "metric", "value")
MEASURED = ("seconds", "tokens", "tokens_per_second")
CURVE_NUMBERS = {"seed": "int64", "step": "int64", "tokens": "int64", "value": "float64"}
# Keys of a line of metrics.jsonl that are not metrics.
LINE_KEYS = frozenset({"step", "tokens", "seconds", "split"})


@dataclass(frozen=True)
class Results:
    """A study as it stands on disk.

    ``choices`` says, by setting and variant, which point of tuned axes each variant is run at.
    """

    folder: Path
    plan: StudyPlan
    provenance: dict[str, Any]
    runs: pd.DataFrame
    curves: pd.DataFrame
    tasks: dict[str, TaskFacts]
    choices: dict[tuple[str, str], Choice] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a study folder. Raises TwofoldError if it is none, or if study.json cannot be read."""
        folder = Path(folder)
        record = StudyRecord.read(folder)
        alive = is_held(folder)
        rows: list[dict[str, Any]] = []
        points: list[tuple[Any, ...]] = []
        choices = {(c.setting, c.variant): c.choice(folder) for c in contests(record)}
        settings = {task.name: task.setting for task in record.plan.planned_tasks}
        for planned in runs(record, folder):
            choice = choices.get((settings[planned.entry.task], planned.entry.variant))
            is_result = choice is None or (planned.entry.task == choice.task and planned.seed in record.plan.seeds)
            purpose = {"purpose": "result" if is_result else "tuning"}
            rows.append(_row(planned, planned.folder(folder), alive=alive) | purpose)
            points.extend(_curve(planned, planned.folder(folder)))
        return cls(
            folder=folder,
            plan=record.plan,
            provenance=dict(record.provenance),
            runs=pd.DataFrame(rows, columns=_columns(rows)),
            # Without a single point there are no types to be found out.
            curves=pd.DataFrame(points, columns=list(CURVE_COLUMNS)).astype(CURVE_NUMBERS),
            tasks=dict(record.tasks),
            choices=choices,
        )

    @property
    def undecided(self) -> int:
        """Runs that are planned at points that are still to be chosen."""
        return sum(len(choice.contest.later_seeds) for choice in self.choices.values() if choice.is_open)

    def at_choices(self) -> Results:
        """The same with each setting of tuned axes as one task, on which each variant has the runs of its chosen point.

        A variant without a choice has its runs there too, all of them pending.
        """
        planned = {task.name: task for task in self.plan.planned_tasks}
        settings = {name: task.setting for name, task in planned.items()}
        shown = self.runs[self.runs.purpose == "result"]
        columns = [str(name) for name in self.runs]
        unmeasured = {name: math.nan for name in columns if name.startswith("score:") or name in MEASURED}
        hopeful = [
            self.runs[(self.runs.task == choice.contest.tasks[0].name) & (self.runs.variant == variant)]
            .iloc[[0] * len(self.plan.seeds)]
            .assign(seed=self.plan.seeds, status="pending", error="", data_order="")
            .assign(**unmeasured)
            for (_, variant), choice in self.choices.items()
            if choice.task is None
        ]
        chosen = shown[["task", "variant", "seed"]].drop_duplicates()
        return Results(
            folder=self.folder,
            plan=self.plan,
            provenance=self.provenance,
            runs=pd.concat([shown, *hopeful], ignore_index=True).replace({"task": settings}),
            curves=self.curves.merge(chosen, on=["task", "variant", "seed"]).replace({"task": settings}),
            tasks={
                planned[name].setting: replace(
                    facts, title=planned[name].setting_title, points=planned[name].untuned_points
                )
                for name, facts in self.tasks.items()
            },
            choices=self.choices,
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
        "data_order": outcome.get("data_order", ""),
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
