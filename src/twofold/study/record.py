"""study.json: the plan, what it expands to, and where and with what it was begun. Written once per change, read by all; no torch.

A run is kept once per task and variant, because its seeds differ in nothing else:

    {"format": 1, "plan": {...}, "plan_hash": ..., "code_hash": ..., "provenance": {...},
     "tasks": {name: TaskFacts}, "entries": [{"task", "variant", "run": RunSpec without its seed, "fingerprints": {seed: ...}, ...}]}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from twofold.errors import TwofoldError
from twofold.storage import write_json
from twofold.study.plan import StudyPlan
from twofold.training.spec import RunSpec

FORMAT = 1
FILE_NAME = "study.json"


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """What a report must know of a task without loading it.

    ``loss_metric`` is the metric of the central figure (lower is better), ``score`` the headline metric, of which ``higher_is_better``
    speaks. ``group`` is the task's name in the plan and ``points`` what its grid made of it (axis name -> point name; empty without a
    grid). ``data_hash`` is the SHA-256 of the data, training and held-out. ``chance`` is the score of the best guess
    that does not use what was asked (None: not known), ``held_out_size`` counts examples (0: not known).
    """

    title: str
    description: str
    loss_metric: str
    score: str
    higher_is_better: bool
    group: str
    points: Mapping[str, str]
    train_size: int
    tokens_per_example: int
    data_hash: str
    held_out_size: int = 0
    chance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A variant on a task: everything but the seed. ``run`` is a RunSpec's dict without its seed.

    ``fingerprints`` are by the seed under which a run is filed; it is trained from that plus ``seed_shift``.
    """

    task: str
    variant: str
    label: str
    tie: str
    kind: str
    note: str
    parameters: int
    cached_floats_per_token: int
    cached_bytes_per_token: int
    data_hash: str
    run: Mapping[str, Any]
    fingerprints: Mapping[int, str]
    seed_shift: int = 0


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One training run of a study."""

    entry: Entry
    seed: int

    @property
    def path(self) -> str:
        """Its folder, relative to the study's, with forward slashes; also the name by which it is spoken of."""
        return f"{self.entry.task}/{self.entry.variant}/seed-{self.seed}"

    @property
    def fingerprint(self) -> str:
        """The RunSpec's fingerprint."""
        return self.entry.fingerprints[self.seed]

    @property
    def run(self) -> RunSpec:
        """The whole run as a value."""
        return RunSpec.from_dict({**self.entry.run, "seed": self.seed + self.entry.seed_shift})

    def folder(self, study_folder: Path) -> Path:
        """Where the run's files are."""
        return study_folder / "runs" / self.path


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """The content of study.json."""

    plan: StudyPlan
    code_hash: str
    provenance: Mapping[str, Any]
    tasks: Mapping[str, TaskFacts]
    entries: tuple[Entry, ...] = field(repr=False)

    @property
    def runs(self) -> Iterator[PlannedRun]:
        """All runs that are planned from the start: seed by seed, and within a seed task by task, so that early results compare all variants.

        Of tuned tasks these are all points at the seeds that choose; the others come with the choice (see :mod:`twofold.study.tuning`).
        """
        tuned = {task.name for task in self.plan.planned_tasks if task.is_tuned}
        for seed in self.plan.all_seeds:
            for entry in self.entries:
                if seed in (self.plan.choosing_seeds if entry.task in tuned else self.plan.seeds):
                    yield PlannedRun(entry=entry, seed=seed)

    def write(self, folder: Path) -> None:
        """Write study.json, whole or not at all."""
        values = {
            "format": FORMAT,
            "plan": self.plan.to_dict(),
            "plan_hash": self.plan.plan_hash,
            "code_hash": self.code_hash,
            "provenance": dict(self.provenance),
            "tasks": {name: asdict(facts) for name, facts in self.tasks.items()},
            "entries": [asdict(entry) for entry in self.entries],
        }
        write_json(folder / FILE_NAME, values)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read study.json. Raises TwofoldError where there is none or it cannot be read."""
        path = folder / FILE_NAME
        if not path.is_file():
            raise TwofoldError(
                f"{folder} holds no {FILE_NAME}, so it is no study folder: name one that `twofold study run` wrote."
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise TwofoldError(
                    f"{path} is of format {values['format']}, and this version reads format {FORMAT}: begin again in a new folder."
                )
            return cls(
                plan=StudyPlan.model_validate(values["plan"]),
                code_hash=values["code_hash"],
                provenance=values["provenance"],
                tasks={name: TaskFacts(**facts) for name, facts in values["tasks"].items()},
                entries=tuple(entry_from_dict(entry) for entry in values["entries"]),
            )
        except (ValueError, LookupError, TypeError, OSError) as error:
            raise TwofoldError(
                f"{path} cannot be read ({' '.join(str(error).split())}): begin again in a new folder."
            ) from None


def entry_from_dict(values: Mapping[str, Any]) -> Entry:
    """An entry from its dict as JSON gives it back, with seeds as text."""
    seeds = {int(seed): fingerprint for seed, fingerprint in values["fingerprints"].items()}
    return Entry(**{**values, "fingerprints": seeds})
