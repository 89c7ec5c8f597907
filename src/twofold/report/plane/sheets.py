"""What a map of the plane of ties shows, as values: each tie where it lies, the steps between neighbours, and which of them are cliffs.

A *sheet* is one task read by one metric. Ties that differ by the sign of V, *mirror images*, are the same functions and, in distribution, the same
training: their differences are chance, measured in the same runs. A *cliff* is a step between neighbours whose interval excludes zero and that is
larger than every difference between mirror images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from twofold.plane import Point, Region, angle, neighbours, point_of
from twofold.report.summary import BySeed, Section, Summary, VariantSummary
from twofold.study.statistics import Interval, PairedDifference, interval, paired_difference
from twofold.tie import TiePattern

# With fewer ties than these there is no map to speak of.
MIN_TIES = 8


@dataclass(frozen=True, kw_only=True)
class Place:
    """A tie on the map. ``value`` is in the sheet's metric, as is ``by_seed``; ``difference`` is the paired one to the reference."""

    point: Point
    variant: VariantSummary
    value: Interval
    difference: PairedDifference
    by_seed: BySeed

    @cached_property
    def text(self) -> str:
        """The tie, canonically."""
        return str(self.point.tie)

    def minus(self, other: Place) -> PairedDifference:
        """The paired difference to another tie of the same sheet."""
        return paired_difference(self.by_seed, other.by_seed)


@dataclass(frozen=True, kw_only=True)
class Step:
    """From one tie to another: ``difference`` is the paired one of the worse minus the better, in the sheet's metric."""

    better: Place
    worse: Place
    difference: PairedDifference

    @property
    def size(self) -> float:
        """How far, without a sign."""
        return abs(self.difference.mean)

    @property
    def degrees(self) -> float:
        """The angle between the two on the plane."""
        return angle(self.better.point, self.worse.point)

    @property
    def crosses_border(self) -> bool:
        """Whether the two can compute different functions."""
        return self.better.point.region is not self.worse.point.region


@dataclass(frozen=True, kw_only=True)
class RegionSummary:
    """The ties of one region on a sheet: their number, the mean of their means, and the best and the worst mean."""

    region: Region
    ties: int
    mean: float
    best: float
    worst: float


@dataclass(frozen=True, kw_only=True)
class BorderSummary:
    """The steps between ties of two regions, or within one: how many, how many are cliffs, and their mean size."""

    regions: tuple[Region, Region]
    steps: int
    cliffs: int
    mean: float


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """One task by one metric."""

    section: Section
    metric: str
    higher_is_better: bool
    reference: Interval
    places: tuple[Place, ...]
    steps: tuple[Step, ...]
    mirrors: tuple[Step, ...]

    @property
    def is_loss(self) -> bool:
        """Whether it shows the loss; the other sheet of a task shows its score."""
        return self.metric == self.section.loss_metric

    @cached_property
    def chance(self) -> float:
        """The largest difference between mirror images; infinite where there are none with an interval."""
        sizes = [step.size for step in self.mirrors if math.isfinite(step.difference.low)]
        return max(sizes, default=math.inf)

    @cached_property
    def cliffs(self) -> tuple[Step, ...]:
        """The steps that are cliffs, the highest first."""
        found = [step for step in self.steps if step.difference.excludes_zero and step.size > self.chance]
        return tuple(sorted(found, key=lambda step: -step.size))

    @cached_property
    def regions(self) -> tuple[RegionSummary, ...]:
        """The regions that hold a measured tie, the best first."""
        found = []
        for region in Region:
            means = [place.value.mean for place in self.places if place.point.region is region]
            if means:
                ends = (max(means), min(means)) if self.higher_is_better else (min(means), max(means))
                found.append(
                    RegionSummary(
                        region=region, ties=len(means), mean=float(np.mean(means)), best=ends[0], worst=ends[1]
                    )
                )
        return tuple(sorted(found, key=lambda summary: -summary.mean if self.higher_is_better else summary.mean))

    @cached_property
    def borders(self) -> tuple[BorderSummary, ...]:
        """Steps by the regions on their two sides, the highest on average first."""
        order = list(Region)
        found: dict[tuple[Region, Region], list[Step]] = {}
        for step in self.steps:
            one, other = sorted((step.better.point.region, step.worse.point.region), key=order.index)
            found.setdefault((one, other), []).append(step)
        cliffs = {id(step) for step in self.cliffs}
        summaries = [
            BorderSummary(
                regions=regions,
                steps=len(steps),
                cliffs=sum(id(step) in cliffs for step in steps),
                mean=float(np.mean([step.size for step in steps])),
            )
            for regions, steps in found.items()
        ]
        return tuple(sorted(summaries, key=lambda summary: -summary.mean))

    def place(self, tie: str) -> Place | None:
        """The measured place of a tie, given canonically."""
        return self._by_text.get(tie)

    @cached_property
    def _by_text(self) -> dict[str, Place]:
        return {place.text: place for place in self.places}


def sheets(summary: Summary) -> list[Sheet]:
    """The sheets of a study's map; none where it has fewer than ``MIN_TIES`` ties of one equation, all in the same model."""
    points = _points(summary)
    if len(points) < MIN_TIES:
        return []
    found = []
    for section in summary.sections:
        for metric in dict.fromkeys((section.loss_metric, section.score)):
            sheet = _sheet(summary, section, metric, points)
            if sheet.places:
                found.append(sheet)
    return found


def _points(summary: Summary) -> dict[str, Point]:
    """Variant -> point, of the ties of one equation in the reference's model."""
    plan = summary.plan
    shared = _without_tie(plan.variant(plan.reference).model)
    found: dict[str, Point] = {}
    for variant in plan.variants:
        tie = variant.model.get("tie")
        if variant.kind != "tie" or tie is None or _without_tie(variant.model) != shared:
            continue
        ties = TiePattern.parse(tie).ties
        point = point_of(ties[0]) if len(ties) == 1 else None
        if point is not None and point not in found.values():
            found[variant.name] = point
    return found


def _without_tie(model: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in model.items() if name != "tie"}


def _sheet(summary: Summary, section: Section, metric: str, points: Mapping[str, Point]) -> Sheet:
    values = summary.values(section, metric)
    higher_is_better = section.higher_is_better and metric == section.score
    variants = {variant.name: variant for variant in section.variants}
    reference = values[section.reference.name]
    places = [
        Place(
            point=point,
            variant=variants[name],
            value=interval(list(values[name].values())),
            difference=paired_difference(values[name], reference),
            by_seed=values[name],
        )
        for name, point in points.items()
        if values.get(name)
    ]
    by_point = {place.point: place for place in places}
    mirrored = [
        (place, by_point[mirror])
        for place in places
        if (mirror := place.point.mirror) in by_point and place.point.numbers < mirror.numbers
    ]
    near = [(places[i], places[j]) for i, j in neighbours([place.point for place in places])]

    def step(pair: tuple[Place, Place]) -> Step:
        better, worse = sorted(pair, key=lambda place: place.value.mean, reverse=higher_is_better)
        return Step(better=better, worse=worse, difference=worse.minus(better))

    return Sheet(
        section=section,
        metric=metric,
        higher_is_better=higher_is_better,
        reference=interval(list(reference.values())),
        places=tuple(places),
        steps=_with_pairs(map(step, near)),
        mirrors=_with_pairs(map(step, mirrored)),
    )


def _with_pairs(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Those of which at least one seed is done on both sides."""
    return tuple(step for step in steps if step.difference.n)
