"""Tuned axes: every point is run at the seeds that choose, and the best one of each variant at all the others.

What is chosen is read from the runs on disk and from nothing else, so a study that was killed goes on as if it had not been. Of several tuned
axes the points are their product. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from twofold.storage import read_json
from twofold.study.plan import PlannedTask
from twofold.study.record import Entry, PlannedRun, StudyRecord


@dataclass(frozen=True, kw_only=True)
class Contest:
    """One variant on one setting, and the points among which its best is sought: ``tasks`` and ``entries`` in the order of the plan."""

    setting: str
    variant: str
    tasks: tuple[PlannedTask, ...]
    entries: tuple[Entry, ...]
    loss_metric: str
    choosing_seeds: tuple[int, ...]
    later_seeds: tuple[int, ...]

    @property
    def tuning_runs(self) -> Iterator[PlannedRun]:
        """Every point at every seed that chooses."""
        return (PlannedRun(entry=entry, seed=seed) for seed in self.choosing_seeds for entry in self.entries)

    def later_runs(self, entry: Entry) -> Iterator[PlannedRun]:
        """One point at the seeds that come after the choice."""
        return (PlannedRun(entry=entry, seed=seed) for seed in self.later_seeds)

    def choice(self, folder: Path) -> Choice:
        """What the runs in the study's ``folder`` say."""
        ended = 0
        losses: dict[str, list[float]] = {entry.task: [] for entry in self.entries}
        for planned in self.tuning_runs:
            loss = final_loss(planned.folder(folder), self.loss_metric)
            ended += loss is not None
            losses[planned.entry.task].append(math.inf if loss is None else loss)
        means = {task: float(np.mean(values)) for task, values in losses.items()}
        planned_count = len(self.entries) * len(self.choosing_seeds)
        best = min(means, key=means.__getitem__)
        is_decided = ended == planned_count and math.isfinite(means[best])
        return Choice(contest=self, losses=means, ended=ended, planned=planned_count, task=best if is_decided else None)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a contest stands: mean held-out loss by point (infinite where a run failed or has not ended), and the best point.

    ``task`` is None until all ``planned`` runs have ended, and where no point has all its runs done.
    """

    contest: Contest
    losses: Mapping[str, float]
    ended: int
    planned: int
    task: str | None

    @property
    def is_open(self) -> bool:
        """Whether runs that choose have still to end."""
        return self.ended < self.planned

    @cached_property
    def points(self) -> dict[str, str]:
        """Tuned axis -> the chosen point; empty without a choice."""
        chosen = next((task for task in self.contest.tasks if task.name == self.task), None)
        return {axis: point for axis, point in chosen.points.items() if axis in chosen.tuned} if chosen else {}

    @property
    def at_edge(self) -> tuple[str, ...]:
        """Tuned axes of more than two points whose first or last was chosen: a better one may lie beyond."""
        found = []
        for axis, point in self.points.items():
            names = list(dict.fromkeys(task.points[axis] for task in self.contest.tasks))
            if len(names) > 2 and point in (names[0], names[-1]):
                found.append(axis)
        return tuple(found)

    @property
    def later_runs(self) -> Iterator[PlannedRun]:
        """The chosen point's runs at the other seeds; none without a choice."""
        chosen = (entry for entry in self.contest.entries if entry.task == self.task)
        return (planned for entry in chosen for planned in self.contest.later_runs(entry))


def contests(record: StudyRecord) -> tuple[Contest, ...]:
    """The contests of a study, in the order of its entries; none where no axis is tuned."""
    tasks = {task.name: task for task in record.plan.planned_tasks}
    of_setting: dict[tuple[str, str], list[Entry]] = {}
    for entry in record.entries:
        if tasks[entry.task].is_tuned:
            of_setting.setdefault((tasks[entry.task].setting, entry.variant), []).append(entry)
    plan = record.plan
    return tuple(
        Contest(
            setting=setting,
            variant=variant,
            tasks=tuple(tasks[entry.task] for entry in entries),
            entries=tuple(entries),
            loss_metric=record.tasks[entries[0].task].loss_metric,
            choosing_seeds=plan.choosing_seeds,
            later_seeds=tuple(seed for seed in plan.all_seeds if seed not in plan.choosing_seeds),
        )
        for (setting, variant), entries in of_setting.items()
    )


def runs(record: StudyRecord, folder: Path) -> list[PlannedRun]:
    """All runs as far as they are known: those planned from the start, the chosen points', and those of an earlier choice that were made."""
    found = list(record.runs)
    for contest in contests(record):
        chosen = contest.choice(folder).task
        for entry in contest.entries:
            later = contest.later_runs(entry)
            found += [run for run in later if entry.task == chosen or is_done(run.folder(folder))]
    return found


class Tournament:
    """The runs of one go at a study: those that are ``known``, and those ``expected`` of points that are still to be chosen in it.

    A contest waits for the runs that choose and that this go (which holds the runs of which ``holds`` says so) has to make or, where they
    failed, to make again; one that needs runs of another go is left for that.
    """

    def __init__(self, record: StudyRecord, folder: Path, holds: Callable[[PlannedRun], bool]) -> None:
        self._folder, self._holds = folder, holds
        self.known = [planned for planned in record.runs if holds(planned)]
        self._waiting: list[tuple[set[str], Contest]] = []
        for contest in contests(record):
            lacking = [planned for planned in contest.tuning_runs if not is_done(planned.folder(folder))]
            to_come = {planned.path for planned in lacking if holds(planned)}
            choice = contest.choice(folder)
            if to_come and all(planned.path in to_come or self._has_ended(planned, contest) for planned in lacking):
                self._waiting.append((to_come, contest))
            elif not to_come and not choice.is_open:
                self.known += filter(holds, choice.later_runs)

    def _has_ended(self, planned: PlannedRun, contest: Contest) -> bool:
        return final_loss(planned.folder(self._folder), contest.loss_metric) is not None

    @property
    def expected(self) -> list[PlannedRun]:
        """One run for each that will be chosen, in the name of a contest's first point."""
        return [planned for _, contest in self._waiting for planned in self._expected_of(contest)]

    def _expected_of(self, contest: Contest) -> list[PlannedRun]:
        by_seed = zip(*(contest.later_runs(entry) for entry in contest.entries), strict=True)
        return [points[0] for points in by_seed if any(map(self._holds, points))]

    @property
    def candidates(self) -> list[PlannedRun]:
        """All runs that may be chosen."""
        return [run for _, contest in self._waiting for entry in contest.entries for run in contest.later_runs(entry)]

    def ended(self, planned: PlannedRun) -> tuple[list[PlannedRun], list[PlannedRun]] | None:
        """A run has ended: where it was the last that a contest waited for, what was expected of that, and what it comes to."""
        for index, (to_come, contest) in enumerate(self._waiting):
            to_come.discard(planned.path)
            if not to_come:
                del self._waiting[index]
                return self._expected_of(contest), list(filter(self._holds, contest.choice(self._folder).later_runs))
        return None


def final_loss(folder: Path, loss_metric: str) -> float | None:
    """A run's held-out loss at its end, infinite where it failed or is not finite; None where it has not ended."""
    scores = read_json(folder / "outcome.json").get("scores")
    if scores is not None:
        loss = scores.get(loss_metric)
        return loss if isinstance(loss, (int, float)) and math.isfinite(loss) else math.inf
    return math.inf if read_json(folder / "status.json").get("status") == "failed" else None


def is_done(folder: Path) -> bool:
    """Whether a run's folder holds its outcome, which is written last."""
    return bool(read_json(folder / "outcome.json"))
