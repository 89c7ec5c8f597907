"""Summaries turned into the rows of tables: strings, ready to be shown, the same in HTML and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from twofold.report import choices
from twofold.report.curves import Curve, CurveSet
from twofold.report.forest import Rows, differences
from twofold.report.numbers import (
    NOTHING,
    bounds,
    common_decimals,
    count,
    duration,
    mean,
    metric_name,
    number,
    share,
)
from twofold.report.summary import Section, Summary, VariantSummary
from twofold.study.statistics import Interval

MAX_CURVE_ROWS = 10

Row = dict[str, Any]


def cost_name(section: Section) -> str:
    """The heading of the column of costs."""
    return f"Share of {section.reference.label}’s cache" if section.is_grid else "Cached bytes / token (bf16)"


def cost(section: Section, variant: VariantSummary) -> str:
    """A variant's cost."""
    return f"{variant.cost:.3g} ×" if section.is_grid else f"{variant.cost:,.0f}"


def variant_rows(section: Section) -> list[Row]:
    """The main table. The rows of a column share their digits."""
    measures = {
        name: {variant.name: getattr(variant, name) for variant in section.variants}
        for name in ("loss", "score", "difference", "score_difference")
    }
    places = {name: common_decimals(of_variants.values()) for name, of_variants in measures.items()}
    rows = []
    for variant in section.variants:
        row: Row = {
            "label": variant.label,
            "tie": "" if variant.tie == variant.label else variant.tie,
            "role": "reference" if variant.is_reference else "control" if variant.kind == "control" else "",
            "note": variant.note,
            "chosen": choices.cell(section, variant.name),
            "parameters": _range(variant.parameters),
            "floats": _range(variant.cached_floats),
            "cost": cost(section, variant),
            "n": variant.loss.n,
            "time": duration(variant.seconds),
            "speed": f"{variant.tokens_per_second:,.0f}" if math.isfinite(variant.tokens_per_second) else NOTHING,
            "done": f"{variant.done} of {variant.planned}",
            "failed": variant.failed,
        }
        for name, of_variants in measures.items():
            is_difference = name.endswith("difference")
            is_empty = is_difference and variant.is_reference
            shown = of_variants[variant.name]
            row[name] = NOTHING if is_empty else mean(shown, places[name], sign=is_difference)
            row[f"{name}_bounds"] = "" if is_empty else bounds(shown, places[name], sign=is_difference)
        rows.append(row)
    return rows


def front_rows(section: Section) -> list[Row]:
    """The central figure as a table, cheapest first and best first."""
    ordered = sorted(section.drawn, key=lambda variant: (variant.cost, variant.loss.mean))
    places = common_decimals(variant.loss for variant in ordered)
    return [
        {
            "label": variant.label,
            "cost": cost(section, variant),
            "loss": mean(variant.loss, places),
            "bounds": bounds(variant.loss, places) or NOTHING,
            "n": variant.loss.n,
            "on_front": variant.on_front,
            "frequency": share(variant.front_frequency),
        }
        for variant in ordered
    ]


def difference_rows(section: Section) -> list[Row]:
    """The forest as tables: one for each group."""
    return [{"heading": group.heading, "rows": list(_difference_rows(group))} for group in differences(section)]


def _difference_rows(group: Rows) -> Iterator[Row]:
    common = common_decimals(row.difference for row in group.rows) or 0
    for row in group.rows:
        shown = row.difference
        ends = [number(end, common, sign=True) for end in (shown.bootstrap_low, shown.bootstrap_high)]
        yield {
            "label": row.variant.label,
            "mean": mean(shown, common, sign=True),
            "bounds": bounds(shown, common, sign=True) or NOTHING,
            "bootstrap": f"[{ends[0]}, {ends[1]}]" if math.isfinite(shown.bootstrap_low) else NOTHING,
            "n": shown.n,
        }


def curve_tables(section: Section, curves: CurveSet) -> list[Row]:
    """Held-out and training curves at a few moments."""
    kinds = (("Held out", section.loss_metric, curves.held_out), ("Training", curves.metric, curves.train))
    return [
        _curve_table(f"{kind}: {metric_name(metric)}, mean over seeds", section, shown)
        for kind, metric, shown in kinds
        if shown
    ]


def _curve_table(caption: str, section: Section, curves: Sequence[Curve]) -> Row:
    labels = {variant.name: variant.label for variant in section.variants}
    moments = sorted({float(tokens) for curve in curves for tokens in curve.tokens})
    chosen = [moments[index] for index in sorted(set(np.linspace(0, len(moments) - 1, MAX_CURVE_ROWS).astype(int)))]
    values = [dict(zip(curve.tokens.tolist(), curve.mean.tolist(), strict=True)) for curve in curves]
    rows = [
        {"tokens": f"{moment:,.0f}", "cells": [f"{own[moment]:.4g}" if moment in own else NOTHING for own in values]}
        for moment in chosen
    ]
    return {"caption": caption, "columns": [labels[curve.variant] for curve in curves], "rows": rows}


def grid(summary: Summary, section: Section) -> Row:
    """A grid's scores: by each value of each axis, and setting by setting."""
    points = {task: summary.shown.tasks[task].points for task in section.tasks}
    axes = []
    for axis in next(iter(points.values())):
        names = list(dict.fromkeys(own[axis] for own in points.values()))
        rows = []
        for name in names:
            table = summary.score_table(section, [task for task, own in points.items() if own[axis] == name])
            rows.append({"name": name, "cells": _cells([table[variant.name] for variant in section.variants])})
        if len(names) > 1:
            axes.append({"name": axis, "rows": rows})
    settings = []
    for task, own in points.items():
        table = summary.score_table(section, [task])
        settings.append({"name": ", ".join(own.values()), "cells": _cells([table[v.name] for v in section.variants])})
    return {"columns": [variant.label for variant in section.variants], "axes": axes, "rows": settings}


def overview(summary: Summary) -> Row | None:
    """Variants × sections, where there is more than one section and anything is measured."""
    sections = summary.sections
    if len(sections) < 2 or not any(section.measured for section in sections):
        return None
    labels = {variant.name: variant.label for section in sections for variant in section.variants}
    columns_of_cells = []
    for section in sections:
        cells = _cells([variant.score for variant in section.variants])
        pairs = zip(section.variants, cells, strict=True)
        columns_of_cells.append({variant.name: cell | {"on_front": variant.on_front} for variant, cell in pairs})
    rows = [
        {"label": labels[name], "cells": [cells.get(name, _NO_CELL) for cells in columns_of_cells]}
        for name in (variant.name for variant in summary.plan.variants)
        if name in labels
    ]
    columns = [
        {
            "id": section_id(section),
            "title": section.title,
            "score": metric_name(section.score),
            "arrow": "↑" if section.higher_is_better else "↓",
        }
        for section in sections
    ]
    together = any(section.is_grid for section in sections)
    caption = "Mean over seeds of each task’s own score, with 95% intervals" + (
        "; a grid’s is first averaged over its settings" if together else ""
    )
    return {"caption": caption, "columns": columns, "rows": rows}


def provenance(summary: Summary) -> list[tuple[str, str]]:
    """Where the numbers come from: names in words, what is not known left out."""
    told = summary.results.provenance
    hardware = told.get("hardware") or {}
    machine = [str(hardware[name]) + unit for name, unit in _HARDWARE if hardware.get(name)]
    machine += [str(gpu) for gpu in hardware.get("gpus") or []]
    versions = [
        f"{name} {told[name]}" for name in ("python", "torch", "transformers", "accelerate", "numpy") if told.get(name)
    ]
    rows = [
        ("Twofold", " · ".join(str(told[key]) for key in ("twofold", "git_commit") if told.get(key))),
        ("Code, SHA-256", str(told.get("code_hash") or "")),
        ("With", ", ".join(versions)),
        ("Hardware", ", ".join(machine)),
        ("Platform", str(told.get("platform") or "")),
        ("Workers", str(workers(summary) or "")),
        ("Seeds", ", ".join(map(str, summary.plan.seeds))),
        ("Seeds that choose", ", ".join(map(str, summary.plan.choosing_seeds))),
        ("Begun", str(told.get("started_at") or "")),
        ("Plan, SHA-256", summary.plan.plan_hash),
    ]
    rows += [(words, _listed(told.get(name))) for name, words in _HISTORY]
    return [(name, value) for name, value in rows if value]


_NO_CELL: Row = {"mean": NOTHING, "bounds": "", "n": 0, "on_front": False}
_HARDWARE = (("cpu", ""), ("cores", " cores"), ("memory_gib", " GiB of memory"))
_HISTORY = (("invocations", "Run by"), ("code_changes", "Code changed"), ("plan_changes", "Plan changed"))


def workers(summary: Summary) -> int:
    """How many processes train, or trained last; 0 where that is not known."""
    told = summary.results.provenance
    last = (told.get("invocations") or [{}])[-1]
    found = last.get("workers") or told.get("workers")
    return found if isinstance(found, int) else 0


def is_mixed(summary: Summary) -> bool:
    """Whether the runs came from more than one version of the code or the plan, which somebody accepted."""
    return any(summary.results.provenance.get(name) for name in ("code_changes", "plan_changes"))


def _listed(values: Any) -> str:
    """A list of the record, each item as plain text."""
    items = values if isinstance(values, list) else []
    return "; ".join(
        ", ".join(f"{key}: {_plain(value)}" for key, value in item.items() if value not in ([], ""))
        if isinstance(item, dict)
        else str(item)
        for item in items
    )


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def hashes(summary: Summary) -> list[Row]:
    """Data hash -> the tasks that use that data."""
    tasks: dict[str, list[str]] = {}
    for name, facts in summary.results.tasks.items():
        tasks.setdefault(facts.data_hash, []).append(name)
    return [
        {
            "tasks": ", ".join(names) if len(names) < 6 else f"{names[0]} … {names[-1]} ({len(names)} tasks)",
            "hash": data_hash,
        }
        for data_hash, names in tasks.items()
    ]


def section_id(section: Section) -> str:
    """The section's place in the page."""
    return f"task-{section.name}"


def facts(summary: Summary, section: Section) -> str:
    """How much data a task has, in words."""
    told = summary.shown.tasks[section.tasks[0]]
    if section.is_grid:
        seeds = len(summary.plan.seeds)
        return f"{len(section.tasks)} settings taken together; {section.complete_tasks} of them are complete in all {seeds} seeds."
    return f"{told.train_size:,} training examples of {told.tokens_per_example:,} tokens."


def failure_rows(summary: Summary) -> list[Row]:
    """All failed runs."""
    return [asdict(failure) for failure in summary.failures]


def _cells(column: Sequence[Interval]) -> list[Row]:
    places = common_decimals(column)
    return [{"mean": mean(shown, places), "bounds": bounds(shown, places), "n": shown.n} for shown in column]


def _range(ends: tuple[int, int]) -> str:
    low, high = ends
    if low == high:
        return f"{low:,}" if low < 1e7 else count(low)
    return f"{count(low)} – {count(high)}"
