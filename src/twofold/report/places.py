"""Near and far on the page: where scores are told apart by place (``bits_per_byte@16-31``), each variant's difference at each place.

Nearer and farther are compared by seed: the last bucket holds the farther half of all places, and the others, weighted by how many places
each has, the nearer half.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from markupsafe import Markup

from twofold.report.numbers import MINUS, metric_name, metric_unit, with_interval
from twofold.report.panels import Mark, Panel, Series, XAxis, panels
from twofold.report.part import Part, Table
from twofold.report.summary import Summary
from twofold.study.sections import Variant
from twofold.study.statistics import PairedDifference, paired_difference

PLACES = {"bits_per_byte": "bytes before the one that is predicted", "accuracy": "tokens from a key to its query"}

Bucket = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A variant on a task: its difference to the reference in each bucket, of the nearer and the farther half, and farther minus nearer."""

    task: str
    title: str
    variant: Variant
    label: str
    at: Mapping[Bucket, PairedDifference]
    near: PairedDifference
    far: PairedDifference
    farther: PairedDifference


def parts(summary: Summary) -> Iterator[Part]:
    """One part for each metric that is told apart by place."""
    metrics: dict[str, list[_Row]] = {}
    for task in summary.shown.tasks:
        for metric, buckets in _buckets(summary, task).items():
            metrics.setdefault(metric, []).extend(_rows(summary, task, metric, buckets))
    for metric, rows in metrics.items():
        if rows:
            yield _part(summary, metric, rows)


def _buckets(summary: Summary, task: str) -> dict[str, list[Bucket]]:
    """Metric -> the buckets that the task's runs have."""
    runs = summary.shown.runs
    own = runs[runs.task == task].dropna(axis="columns", how="all")
    found: dict[str, list[Bucket]] = {}
    for column in own.columns:
        metric, _, place = column.removeprefix("score:").partition("@")
        if place:
            first, _, last = place.partition("-")
            found.setdefault(metric, []).append((int(first), int(last)))
    return {metric: sorted(buckets) for metric, buckets in found.items() if len(buckets) > 1}


def _rows(summary: Summary, task: str, metric: str, buckets: Sequence[Bucket]) -> Iterator[_Row]:
    def values(variant: str) -> dict[Bucket, Mapping[int, float]]:
        return {bucket: summary.by_seed(task, variant, f"{metric}@{bucket[0]}-{bucket[1]}") for bucket in buckets}

    runs = summary.shown.runs
    reference = values(summary.plan.reference)
    for variant in summary.plan.variants:
        labels = runs[(runs.task == task) & (runs.variant == variant.name)].label
        if variant.name == summary.plan.reference or not len(labels):
            continue
        own = values(variant.name)
        at = {bucket: paired_difference(own[bucket], reference[bucket]) for bucket in buckets}
        near, far = _near(own), own[buckets[-1]]
        near_reference, far_reference = _near(reference), reference[buckets[-1]]
        if at[buckets[-1]].n:
            yield _Row(
                task=task, title=summary.shown.tasks[task].title, variant=variant, label=str(labels.iloc[0]), at=at,
                near=paired_difference(near, near_reference), far=paired_difference(far, far_reference),
                farther=paired_difference(_minus(far, near), _minus(far_reference, near_reference)),
            )  # fmt: skip


def _near(values: Mapping[Bucket, Mapping[int, float]]) -> dict[int, float]:
    """By seed, the mean over all buckets but the last, each weighted by how many places it has."""
    nearer = sorted(values)[:-1]
    weights = [last - first + 1 for first, last in nearer]
    seeds = set.intersection(*(set(values[bucket]) for bucket in nearer))
    return {
        seed: sum(weight * values[bucket][seed] for weight, bucket in zip(weights, nearer, strict=True)) / sum(weights)
        for seed in sorted(seeds)
    }


def _minus(a: Mapping[int, float], b: Mapping[int, float]) -> dict[int, float]:
    return {seed: a[seed] - b[seed] for seed in sorted(set(a) & set(b))}


def _part(summary: Summary, metric: str, rows: Sequence[_Row]) -> Part:
    facts = summary.shown.tasks[rows[0].task]
    is_better_high = facts.higher_is_better and facts.score == metric
    reference = summary.plan.reference
    runs = summary.shown.runs
    reference_label = str(runs[(runs.task == rows[0].task) & (runs.variant == reference)].label.iloc[0])
    drawn = [row for row in rows if row.variant.expect is None or row.variant.expect.outcome == "same"]
    place = PLACES.get(metric, "place")
    return Part(
        name=f"places-{metric}",
        title=f"Near and far: {metric_name(metric)}",
        sentences=[
            _sentence(row, reference_label, metric, is_better_high=is_better_high) for row in rows if row.variant.kind == "tie"
        ],
        caption=f"{metric_name(metric).capitalize()} minus that of {reference_label}, paired by seed, with 95% t intervals, by {place}: each mark is a range that "
        "begins at the number below it and ends before the next. Variants stand side by side."
        + ("" if len(drawn) == len(rows) else " The control that must fail is in the table only."),
        figure=partial(_figure, drawn, metric, "below" if is_better_high else "above"),
        tables=[_table(rows, metric, task) for task in dict.fromkeys(row.task for row in rows)],
        values={"metric": metric, "reference": reference, "rows": [_values(row) for row in rows]},
    )  # fmt: skip


def _sentence(row: _Row, reference: str, metric: str, *, is_better_high: bool) -> str:
    unit, split = metric_unit(metric), max(row.at)[0]
    words = (
        f"{row.title}: {row.label} minus {reference} is {with_interval(row.near, sign=True)} {unit} at fewer than {split:,} "
        f"{PLACES.get(metric, 'places')}, and {with_interval(row.far, sign=True)} from {split:,} on"
    )
    if not math.isfinite(row.farther.low):
        return f"{words} (no interval, so no verdict)."
    shown = f"{with_interval(row.farther, sign=True)}, n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{row.farther.n}"
    if not row.farther.excludes_zero:
        return f"{words}; near and far are not told apart (far {MINUS} near: {shown})."
    loses = "far" if (row.farther.mean > 0) != is_better_high else "near"
    return f"{words}; it fares worse {loses} (far {MINUS} near: {shown})."


def _figure(rows: Sequence[_Row], metric: str, worse: str, width: float) -> Markup:
    starts = sorted({bucket[0] for row in rows for bucket in row.at})
    colours = {name: 1 + index % 8 for index, name in enumerate(dict.fromkeys(row.variant.name for row in rows))}
    shown = []
    for task in dict.fromkeys(row.task for row in rows):
        of_task = [row for row in rows if row.task == task]
        series = tuple(
            Series(
                label=row.label,
                colour=colours[row.variant.name],
                marks=tuple(
                    Mark(x=float(starts.index(bucket[0])), mean=seen.mean, low=seen.low, high=seen.high)
                    for bucket, seen in row.at.items()
                    if seen.n
                ),
                joins_marks=True,
            )
            for row in of_task
        )
        shown.append(Panel(title=of_task[0].title, series=series))
    axis = XAxis(
        low=-0.4, high=len(starts) - 0.6, is_log=False, ticks=tuple(float(index) for index in range(len(starts))),
        name=lambda value: f"{starts[round(value)]:,}", title=PLACES.get(metric, "place"),
    )  # fmt: skip
    title = f"difference in {metric_name(metric)}"
    words = f"{title} by {axis.title}, for {', '.join(dict.fromkeys(row.label for row in rows))}; all values are in the tables below."
    return panels(shown, width, x=axis, y_title=f"{title} · {worse} zero is worse", label=words, columns=2)


def _table(rows: Sequence[_Row], metric: str, task: str) -> Table:
    of_task = [row for row in rows if row.task == task]
    cells = [
        [row.label, *(with_interval(seen, sign=True) for seen in row.at.values()), with_interval(row.farther, sign=True), str(row.far.n)]
        for row in of_task
    ]  # fmt: skip
    columns = [
        "Variant",
        *(f"{first:,}–{last:,}" for first, last in of_task[0].at),
        f"far {MINUS} near",
        "n",
    ]
    caption = f"{of_task[0].title}: difference in {metric_name(metric)} by {PLACES.get(metric, 'place')}"
    return Table(caption=caption, columns=columns, rows=cells)


def _values(row: _Row) -> dict[str, Any]:
    return {
        "task": row.task, "variant": row.variant.name, "label": row.label,
        "at": [{"first": first, "last": last} | _interval(seen) for (first, last), seen in row.at.items()],
        "near": _interval(row.near), "far": _interval(row.far), "far_minus_near": _interval(row.farther),
    }  # fmt: skip


def _interval(seen: PairedDifference) -> dict[str, float]:
    return {"mean": seen.mean, "low": seen.low, "high": seen.high, "n": seen.n}
