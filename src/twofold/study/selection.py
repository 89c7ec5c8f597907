"""Which runs of a study are meant by ``--only``: any subset, named by what the plan names.

A selector is the name of a task (or of the group that a grid made into several), of a point of a grid, of a variant or a family, or ``seed-N``. Selectors of
one kind add up, different kinds narrow each other: ``reverse sort T64 seed-0`` is two tasks, at one length, with one seed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from twofold.errors import TwofoldError
from twofold.study.plan import PlannedTask, StudyPlan
from twofold.study.record import PlannedRun


class Selection:
    """The runs of ``plan`` that ``selectors`` name; all of them where there are none. Raises TwofoldError for a name that is none."""

    def __init__(self, plan: StudyPlan, selectors: Sequence[str]) -> None:
        self._tasks = {task.name: task for task in plan.planned_tasks}
        self._families = _families(plan)
        known = _known(plan)
        self._chosen: dict[str, set[str]] = {}
        for selector in selectors:
            kind = next((kind for kind, names in known.items() if selector in names), None)
            if kind is None:
                raise TwofoldError(_sentence(selector, known))
            self._chosen.setdefault(kind, set()).add(selector)

    def wants(self, task: PlannedTask) -> bool:
        """Whether any run of the task may be meant."""
        names = _names(task, "", -1, {})
        return all(
            chosen & names.get(kind, set()) for kind, chosen in self._chosen.items() if kind not in ("variant", "seed")
        )

    def holds(self, planned: PlannedRun) -> bool:
        """Whether the run is among those that are meant."""
        names = _names(self._tasks[planned.entry.task], planned.entry.variant, planned.seed, self._families)
        return all(chosen & names.get(kind, set()) for kind, chosen in self._chosen.items())


def _names(task: PlannedTask, variant: str, seed: int, families: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """What one run is called, by kind of name."""
    points = {f"point of {axis}": {point} for axis, point in task.points.items()}
    return {
        "task": {task.name, task.group, task.setting},
        **points,
        "variant": {variant, *families.get(variant, ())},
        "seed": {f"seed-{seed}"},
    }


def _families(plan: StudyPlan) -> dict[str, set[str]]:
    return {variant.name: {variant.family} for variant in plan.variants if variant.family}


def _known(plan: StudyPlan) -> dict[str, set[str]]:
    known: dict[str, set[str]] = {"task": set()}
    families = _families(plan)
    for task in plan.planned_tasks:
        for variant in task.variants:
            for seed in plan.all_seeds:
                for kind, names in _names(task, variant, seed, families).items():
                    known.setdefault(kind, set()).update(names)
    return known


def _sentence(selector: str, known: Mapping[str, set[str]]) -> str:
    names = sorted({name for names in known.values() for name in names})
    near = difflib.get_close_matches(selector, names, n=1)
    if near:
        return f"This study has no task, grid point, variant or seed called {selector!r}: did you mean {near[0]!r}?"
    short = {kind: sorted(names, key=len)[:8] for kind, names in known.items()}
    listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in short.items())
    return f"This study has no task, grid point, variant or seed called {selector!r}; it has ({listed})."
