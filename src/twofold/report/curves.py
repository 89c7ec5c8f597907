"""Curves over tokens: a mean with its interval over seeds at each step, and the difference to the reference.

Seeds that are done speak for a variant as soon as there is one; before that, those under way do. So a mean never jumps because a seed
that is half done drops out in the middle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from twofold.report.summary import Section, Summary

MAX_POINTS = 90


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A variant's mean over seeds at each of its steps; ``low`` and ``high`` are NaN where fewer than 2 seeds are there."""

    variant: str
    tokens: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    n: int


@dataclass(frozen=True, kw_only=True)
class CurveSet:
    """The curves of one task: held-out and training loss, and held-out loss minus the reference's."""

    metric: str
    held_out: tuple[Curve, ...]
    train: tuple[Curve, ...]
    difference: tuple[Curve, ...]


def curves(summary: Summary, section: Section) -> CurveSet:
    """The curves of a section that is one task."""
    task, metric = section.tasks[0], section.loss_metric
    rows = summary.shown.curves
    of_task = rows[rows.task == task]
    # The training loss is logged as "loss" whatever the task reports: the nearest of the two names that is there.
    names = set(of_task[of_task.split == "train"].metric)
    train_metric = metric if metric in names else "loss"
    held_out = _tables(summary, section, of_task[(of_task.split == "held_out") & (of_task.metric == metric)])
    train = _tables(summary, section, of_task[(of_task.split == "train") & (of_task.metric == train_metric)])
    return CurveSet(
        metric=train_metric,
        held_out=tuple(_curve(name, table) for name, table in held_out.items()),
        train=tuple(_curve(name, table) for name, table in train.items()),
        difference=tuple(_differences(held_out, section.reference.name)),
    )


def _tables(summary: Summary, section: Section, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """For each variant a table tokens × seeds, thinned to MAX_POINTS."""
    runs = summary.shown.runs
    done = runs[(runs.task == section.tasks[0]) & (runs.status == "done")]
    of_variants = dict(list(rows[np.isfinite(rows.value)].groupby("variant", sort=False)))
    tables = {}
    for variant in section.variants:
        if variant.name in of_variants:
            own = of_variants[variant.name]
            if seeds := set(done[done.variant == variant.name].seed) & set(own.seed):
                own = own[own.seed.isin(seeds)]
            table = own.pivot(index="tokens", columns="seed", values="value").sort_index()
            tables[variant.name] = table.iloc[_thinned(len(table))]
    return tables


def _thinned(length: int) -> list[int]:
    """Indices to draw: dense at the start, where curves bend, and even afterwards; first and last always."""
    if length <= MAX_POINTS:
        return list(range(length))
    half = MAX_POINTS // 2
    chosen = {*np.geomspace(1, length, half).astype(int) - 1, *np.linspace(0, length - 1, half).astype(int)}
    return sorted(int(index) for index in chosen)


def _differences(tables: Mapping[str, pd.DataFrame], reference: str) -> list[Curve]:
    if reference not in tables:
        return []
    base = tables[reference]
    found = []
    for name, table in tables.items():
        if name != reference:
            paired = (table - base).dropna(how="all").dropna(how="all", axis=1)
            if len(paired):
                found.append(_curve(name, paired))
    return found


def _curve(name: str, table: pd.DataFrame) -> Curve:
    values = table.to_numpy(dtype=np.float64)
    n = np.isfinite(values).sum(axis=1)
    mean = np.nanmean(values, axis=1)
    half = np.full(len(values), np.nan)
    several = n > 1
    if several.any():
        spread = np.nanstd(values[several], axis=1, ddof=1)
        half[several] = stats.t.ppf(0.975, n[several] - 1) * spread / np.sqrt(n[several])
    return Curve(
        variant=name,
        tokens=table.index.to_numpy(dtype=np.float64),
        mean=mean,
        low=mean - half,
        high=mean + half,
        n=int(n.max()),
    )
