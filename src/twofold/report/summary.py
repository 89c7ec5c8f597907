"""What a report says, as values: each task's variants with their intervals, differences and place on the front.

A *section* is one task, or all points of a task's grid taken together. Of a grid, a seed's value is the mean over the points that every
variant has finished in that seed, and a variant's cost is its share of the reference's cache, because sizes differ from point to point.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from twofold.study.plan import StudyPlan
from twofold.study.results import Results, TaskFacts
from twofold.study.sections import Variant
from twofold.study.statistics import (
    Interval,
    PairedDifference,
    front_frequency,
    interval,
    paired_difference,
    pareto_front,
)
from twofold.study.tuning import Choice

# A study of more tasks than this shows the points of each grid together instead of one by one.
MAX_SINGLE_TASKS = 12

BySeed = Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class VariantSummary:
    """One variant in one section. ``cost`` is cached bytes per token, or in a grid the share of the reference's.

    ``is_way``: it is a way to spend the cache, and no control whose outcome is known, such as the same model from other seeds.
    """

    name: str
    label: str
    tie: str
    kind: str
    note: str
    index: int
    is_reference: bool
    is_way: bool
    parameters: tuple[int, int]
    cached_floats: tuple[int, int]
    cost: float
    loss: Interval
    score: Interval
    difference: PairedDifference
    score_difference: PairedDifference
    on_front: bool
    front_frequency: float
    seconds: float
    tokens_per_second: float
    done: int
    failed: int
    planned: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A control against another variant, in loss. ``quantity`` is what they share, or the outcome that the control must have."""

    quantity: str
    variant: VariantSummary
    other: VariantSummary
    difference: PairedDifference


@dataclass(frozen=True, kw_only=True)
class Section:
    """One task, or one grid of tasks.

    ``controls`` are the differences that must come out in one way, ``choices`` the points at which each variant of a tuned task is run.
    """

    name: str
    title: str
    description: str
    loss_metric: str
    score: str
    higher_is_better: bool
    tasks: tuple[str, ...]
    complete_tasks: int
    variants: tuple[VariantSummary, ...]
    comparisons: tuple[Comparison, ...]
    controls: tuple[Comparison, ...]
    choices: tuple[Choice, ...]
    front_seeds: int

    @property
    def is_grid(self) -> bool:
        """Whether several tasks are taken together."""
        return len(self.tasks) > 1

    @property
    def measured(self) -> tuple[VariantSummary, ...]:
        """Variants of which at least one seed is done."""
        return tuple(variant for variant in self.variants if variant.loss.n)

    @property
    def ways(self) -> tuple[VariantSummary, ...]:
        """Of these the ways to spend the cache."""
        return tuple(variant for variant in self.measured if variant.is_way)

    @property
    def drawn(self) -> tuple[VariantSummary, ...]:
        """Those that the central figure shows: all but controls with a known outcome whose cache is smaller or larger than any way's."""
        costs = [variant.cost for variant in self.ways]
        return tuple(v for v in self.measured if v.is_way or (costs and min(costs) <= v.cost <= max(costs)))

    @property
    def undrawn(self) -> tuple[VariantSummary, ...]:
        """Those that are measured and not drawn."""
        return tuple(variant for variant in self.measured if variant not in self.drawn)

    @property
    def reference(self) -> VariantSummary:
        """The variant that the others are compared with."""
        return next(variant for variant in self.variants if variant.is_reference)

    @property
    def front(self) -> tuple[VariantSummary, ...]:
        """The Pareto front of mean loss and cost, cheapest first."""
        return tuple(sorted((v for v in self.variants if v.on_front), key=lambda variant: variant.cost))


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that failed and the sentence it left."""

    task: str
    label: str
    seed: int
    error: str


class Summary:
    """All sections of a study, and how far it has come.

    ``results`` are all runs; ``shown`` those of which the report speaks, where each variant has the chosen point of tuned axes.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        self.shown = results.at_choices() if results.choices else results
        self.plan: StudyPlan = results.plan
        self.states: Counter[str] = Counter(results.runs.status.tolist())
        self.states["pending"] += results.undecided
        self._values = _values(self.shown)
        self._entries = _entries(self.shown)

    @property
    def planned(self) -> int:
        """How many runs the study is."""
        return self.states.total()

    @property
    def is_complete(self) -> bool:
        """Whether every run has ended, well or badly."""
        return self.states["done"] + self.states["failed"] == self.planned

    @property
    def is_running(self) -> bool:
        """Whether somebody is at work on it."""
        return self.states["running"] > 0

    @cached_property
    def failures(self) -> tuple[Failure, ...]:
        """All failed runs, in the order of the plan."""
        failed = self.results.runs[self.results.runs.status == "failed"]
        rows = zip(failed.task, failed.label, failed.seed, failed.error, strict=True)
        return tuple(Failure(task=task, label=label, seed=int(seed), error=error) for task, label, seed, error in rows)

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """One section per task; one per grid where the study has many tasks."""
        groups: dict[str, list[str]] = {}
        for name, facts in self.shown.tasks.items():
            groups.setdefault(facts.group if len(self.shown.tasks) > MAX_SINGLE_TASKS else name, []).append(name)
        return tuple(self._section(name, tuple(tasks)) for name, tasks in groups.items())

    def by_seed(self, task: str, variant: str, metric: str) -> BySeed:
        """The same as ``Results.by_seed``, from one pass over the runs."""
        return self._values.get((task, variant, metric), {})

    def variant_names(self, task: str) -> list[str]:
        """The variants that are planned on a task, in the order of the plan."""
        return [variant.name for variant in self.plan.variants if (task, variant.name) in self._entries]

    def score_table(self, section: Section, tasks: Sequence[str]) -> dict[str, Interval]:
        """Each variant's score over some of a section's tasks, by the rule of the section's own numbers."""
        of_variants = self._together(tasks, section.score)
        return {variant.name: interval(list(of_variants[variant.name].values())) for variant in section.variants}

    def values(self, section: Section, metric: str) -> dict[str, BySeed]:
        """Each variant's value of a metric per seed in a section, by the rule of the section's own numbers."""
        return self._together(section.tasks, metric)

    def _together(self, tasks: Sequence[str], metric: str) -> dict[str, BySeed]:
        """Each variant's value per seed: of one task its own; of several, the mean over those that all variants have finished."""
        names = self.variant_names(tasks[0])
        if len(tasks) == 1:
            return {name: self.by_seed(tasks[0], name, metric) for name in names}
        begun = [name for name in names if any(self.by_seed(task, name, metric) for task in tasks)]
        means: dict[str, dict[int, float]] = {name: {} for name in names}
        for seed in self.plan.seeds:
            whole = [task for task in tasks if all(seed in self.by_seed(task, name, metric) for name in begun)]
            for name in begun if whole else ():
                means[name][seed] = float(np.mean([self.by_seed(task, name, metric)[seed] for task in whole]))
        return dict(means)

    def _group_title(self, facts: TaskFacts) -> str:
        entry = next(task for task in self.plan.tasks if task.name == facts.group)
        return entry.title or entry.name

    def _complete(self, tasks: Sequence[str], metric: str) -> int:
        """Tasks that every variant has finished in every seed."""
        seeds = set(self.plan.seeds)
        return sum(
            all(seeds == set(self.by_seed(task, name, metric)) for name in self.variant_names(task)) for task in tasks
        )

    def _section(self, name: str, tasks: tuple[str, ...]) -> Section:
        facts = self.shown.tasks[tasks[0]]
        losses, scores = (self._together(tasks, metric) for metric in (facts.loss_metric, facts.score))
        costs = {variant: self._cost(tasks, variant) for variant in losses}
        measured = {variant: by_seed for variant, by_seed in losses.items() if by_seed}
        ways = {variant: by_seed for variant, by_seed in measured.items() if self._is_way(variant)}
        means = {variant: (costs[variant], float(np.mean(list(by_seed.values())))) for variant, by_seed in ways.items()}
        front, frequency = set(pareto_front(means)), front_frequency(ways, costs)
        shared = set.intersection(*(set(by_seed) for by_seed in ways.values())) if ways else set()
        labels = _labels(
            [self.plan.variant(variant) for variant in losses], {v: self._entries[tasks[0], v] for v in losses}
        )
        variants = tuple(
            self._variant(
                tasks, variant, labels[variant], losses=losses, scores=scores, cost=costs[variant],
                on_front=variant in front, frequency=frequency.get(variant, math.nan),
            )
            for variant in losses
        )  # fmt: skip
        return Section(
            name=name,
            title=facts.title if len(tasks) == 1 else self._group_title(facts),
            description=facts.description,
            loss_metric=facts.loss_metric,
            score=facts.score,
            higher_is_better=facts.higher_is_better,
            tasks=tasks,
            complete_tasks=self._complete(tasks, facts.loss_metric),
            variants=variants,
            comparisons=tuple(self._comparisons(variants, losses, self._matches)),
            controls=tuple(self._comparisons(variants, losses, self._expectations)),
            choices=tuple(choice for (setting, _), choice in self.results.choices.items() if setting in tasks),
            front_seeds=len(shared),
        )

    def _variant(
        self, tasks: tuple[str, ...], name: str, label: str, *, losses: Mapping[str, BySeed], scores: Mapping[str, BySeed],
        cost: float, on_front: bool, frequency: float,
    ) -> VariantSummary:  # fmt: skip
        entries = [self._entries[task, name] for task in tasks]
        states = Counter(state for entry in entries for state in entry.states)
        reference = self.plan.reference
        return VariantSummary(
            name=name,
            label=label,
            tie=entries[0].tie,
            kind=entries[0].kind,
            note=entries[0].note,
            index=[variant.name for variant in self.plan.variants].index(name),
            is_reference=name == reference,
            is_way=self._is_way(name),
            parameters=(min(e.parameters for e in entries), max(e.parameters for e in entries)),
            cached_floats=(min(e.cached_floats for e in entries), max(e.cached_floats for e in entries)),
            cost=cost,
            loss=interval(list(losses[name].values())),
            score=interval(list(scores[name].values())),
            difference=paired_difference(losses[name], losses[reference]),
            score_difference=paired_difference(scores[name], scores[reference]),
            on_front=on_front,
            front_frequency=frequency,
            seconds=_mean([value for entry in entries for value in entry.seconds]),
            tokens_per_second=_mean([value for entry in entries for value in entry.tokens_per_second]),
            done=states["done"],
            failed=states["failed"],
            planned=states.total(),
        )

    def _is_way(self, name: str) -> bool:
        variant = self.plan.variant(name)
        return not (variant.seed_shift or variant.expect)

    def _cost(self, tasks: Sequence[str], variant: str) -> float:
        own = [self._entries[task, variant].cached_bytes for task in tasks]
        if len(tasks) == 1:
            return float(own[0])
        of_reference = [self._entries[task, self.plan.reference].cached_bytes for task in tasks]
        return float(np.exp(np.mean(np.log(np.array(own) / np.array(of_reference)))))

    @property
    def _matches(self) -> list[tuple[str, str, str]]:
        return [(match.quantity, own.name, match.variant) for own in self.plan.variants for match in own.matches]

    @property
    def _expectations(self) -> list[tuple[str, str, str]]:
        return [(own.expect.outcome, own.name, own.expect.variant) for own in self.plan.variants if own.expect]

    def _comparisons(
        self, variants: Sequence[VariantSummary], losses: Mapping[str, BySeed], pairs: Sequence[tuple[str, str, str]]
    ) -> list[Comparison]:
        by_name = {variant.name: variant for variant in variants}
        found = [
            Comparison(
                quantity=quantity,
                variant=by_name[a],
                other=by_name[b],
                difference=paired_difference(losses[a], losses[b]),
            )
            for quantity, a, b in pairs
            if a in by_name and b in by_name
        ]
        return sorted(found, key=lambda comparison: (comparison.quantity, comparison.other.index))


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A variant on a task, over its seeds."""

    tie: str
    kind: str
    note: str
    label: str
    parameters: int
    cached_floats: int
    cached_bytes: int
    states: tuple[str, ...]
    seconds: tuple[float, ...]
    tokens_per_second: tuple[float, ...]


def _entries(results: Results) -> dict[tuple[str, str], _Entry]:
    rows: dict[tuple[str, str], list[dict]] = {}
    for row in results.runs.to_dict("records"):
        rows.setdefault((row["task"], row["variant"]), []).append(row)
    return {key: _entry(of_variant) for key, of_variant in rows.items()}


def _entry(rows: list[dict]) -> _Entry:
    first = rows[0]
    return _Entry(
        tie=first["tie"],
        kind=first["kind"],
        note=first["note"],
        label=first["label"],
        parameters=int(first["parameters"]),
        cached_floats=int(first["cached_floats_per_token"]),
        cached_bytes=int(first["cached_bytes_per_token"]),
        states=tuple(row["status"] for row in rows),
        seconds=tuple(row["seconds"] for row in rows if math.isfinite(row["seconds"])),
        tokens_per_second=tuple(row["tokens_per_second"] for row in rows if math.isfinite(row["tokens_per_second"])),
    )


def _values(results: Results) -> dict[tuple[str, str, str], dict[int, float]]:
    """(task, variant, metric) -> seed -> final value, for runs that are done and values that are finite."""
    values: dict[tuple[str, str, str], dict[int, float]] = {}
    done = results.runs[results.runs.status == "done"]
    for column in (name for name in done.columns if name.startswith("score:")):
        for task, variant, seed, value in zip(done.task, done.variant, done.seed, done[column], strict=True):
            if math.isfinite(value):
                values.setdefault((task, variant, column.removeprefix("score:")), {})[int(seed)] = float(value)
    return values


def _labels(variants: Sequence[Variant], entries: Mapping[str, _Entry]) -> dict[str, str]:
    """Each variant's label, with its name where two would read alike."""
    counts = Counter(entry.label for entry in entries.values())
    labels = {variant.name: entries[variant.name].label for variant in variants}
    return {name: label if counts[label] == 1 else f"{label} · {name}" for name, label in labels.items()}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan
