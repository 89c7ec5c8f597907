"""Tuned axes in words: at which point each variant of a section was run, how that was chosen, and whether it lies at the edge."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from twofold.report.summary import Section, Summary
from twofold.study.tuning import Choice


def facts(summary: Summary, section: Section) -> str:
    """How the points of a section were chosen, and what is missing; empty where none is tuned."""
    if not section.choices:
        return ""
    contest = section.choices[0].contest
    axes = {axis: dict.fromkeys(task.points[axis] for task in contest.tasks) for axis in sorted(contest.tasks[0].tuned)}
    listed = " and ".join(f"{axis} ({', '.join(points)})" for axis, points in axes.items())
    seeds = ", ".join(map(str, contest.choosing_seeds))
    told = [
        f"Each variant is run at its own best {listed}, by the mean held-out loss over seed{'s' * (len(contest.choosing_seeds) > 1)} {seeds}."
    ]
    if shared := [seed for seed in contest.choosing_seeds if seed in summary.plan.seeds]:
        told.append(
            f"Seed{'s' * (len(shared) > 1)} {', '.join(map(str, shared))}, which chose, {'are' if len(shared) > 1 else 'is'} among the results, "
            f"where the best of {len(contest.tasks)} flatters each variant a little."
        )
    labels = {variant.name: variant.label for variant in section.variants}

    def names(choices: Sequence[Choice]) -> str:
        return ", ".join(dict.fromkeys(labels[choice.contest.variant] for choice in choices))

    if unfinished := [choice for choice in section.choices if choice.is_open]:
        told.append(
            f"The choice is open for {len(unfinished)} of {len(section.choices)}, whose tuning runs have not all ended: {names(unfinished)}."
        )
    if lost := [choice for choice in section.choices if not choice.is_open and choice.task is None]:
        told.append(f"At no point were all runs done, so there is no choice: {names(lost)}.")
    if edges := [choice for choice in section.choices if choice.at_edge]:
        told.append(f"Chosen at the edge, so a better point may lie beyond: {names(edges)}.")
    return " ".join(told)


def cell(section: Section, variant: str) -> str:
    """The chosen point of a variant, or of its settings with their counts."""
    counts = Counter(_words(choice) for choice in section.choices if choice.contest.variant == variant)
    return ", ".join(words if len(counts) == 1 else f"{words} × {count}" for words, count in counts.most_common())


def _words(choice: Choice) -> str:
    if choice.task is None:
        return f"open ({choice.ended} of {choice.planned} tuning runs)" if choice.is_open else "none finished"
    return " ".join(choice.points.values()) + (" (edge)" if choice.at_edge else "")


def as_dict(choice: Choice) -> dict[str, Any]:
    """A choice for programs; the loss of a point that lost by failing is null."""
    return {
        "setting": choice.contest.setting,
        "variant": choice.contest.variant,
        "task": choice.task,
        "points": choice.points,
        "at_edge": list(choice.at_edge),
        "choosing_seeds": list(choice.contest.choosing_seeds),
        "mean_losses": {task: loss if math.isfinite(loss) else None for task, loss in choice.losses.items()},
        "tuning_runs": {"ended": choice.ended, "planned": choice.planned},
    }
