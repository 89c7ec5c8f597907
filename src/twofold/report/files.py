"""The tables beside the page, as text: CSV and JSON, the same for the same folder."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from typing import Any

import pandas as pd

from twofold.report import budgets, choices, controls, evidence
from twofold.report.answer import answer, status
from twofold.report.drawing import tag
from twofold.report.forest import differences
from twofold.report.frontier import frontier
from twofold.report.page import figure_style, run_command
from twofold.report.part import Part
from twofold.report.parts import parts
from twofold.report.summary import Section, Summary

FORMAT = 1
STATIC_WIDTH, STATIC_HEIGHT, MARGIN = 880, 460, 24


def runs_csv(summary: Summary) -> str:
    """One line per planned run."""
    return _csv(summary.results.runs)


def curves_csv(summary: Summary) -> str:
    """One line per logged value."""
    return _csv(summary.results.curves)


def differences_csv(summary: Summary) -> str:
    """One line per paired difference in loss: to the reference, at equal cache, parameters or operations, and of controls that must come out so."""
    columns = ["section", "metric", "within", "variant", "other", "mean", "low", "high", "n", "method",
               "bootstrap_low", "bootstrap_high", "bootstrap_method"]  # fmt: skip
    lines: list[dict[str, Any]] = []
    for section in summary.sections:
        about = {"section": section.name, "metric": section.loss_metric}
        lines += [
            about | {"within": "reference", "variant": v.name, "other": section.reference.name} | asdict(v.difference)
            for v in section.variants
            if not v.is_reference and v.difference.n
        ]
        lines += [
            about | {"within": c.quantity, "variant": c.variant.name, "other": c.other.name} | asdict(c.difference)
            for c in (*section.comparisons, *section.controls)
            if c.difference.n
        ]
    return _csv(pd.DataFrame(lines, columns=columns))


def report_json(summary: Summary, report_command: str) -> str:
    """Everything that the page says, for programs; what has no value is null."""
    values = {
        "format": FORMAT,
        "study": summary.plan.name,
        "title": summary.plan.title,
        "question": summary.plan.question,
        "status": {
            "text": status(summary),
            "planned": summary.planned,
            "is_complete": summary.is_complete,
            **summary.states,
        },
        "commands": {"run": run_command(summary), "report": report_command},
        "sections": [_section(summary, section) for section in summary.sections],
        "parts": [
            {"name": part.name, "title": part.title, "sentences": list(part.sentences), **part.values}
            for part in parts(summary)
        ],
        "controls": {"tally": controls.tally(summary), "failures": controls.failures(summary)},
        "failures": [asdict(failure) for failure in summary.failures],
        "provenance": summary.results.provenance,
        "plan_hash": summary.plan.plan_hash,
        "data_hashes": {name: facts.data_hash for name, facts in summary.results.tasks.items()},
    }
    return json.dumps(finite(values), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def frontier_svg(section: Section) -> str:
    """The central figure as a file of its own: a light card, which reads on any ground."""
    return card(frontier(section, STATIC_WIDTH, STATIC_HEIGHT, static=True))


def part_svg(part: Part) -> str:
    """A part's figure as a file of its own."""
    return card(part.figure(STATIC_WIDTH))


def card(figure: str, *, has_dark: bool = False, css: str = "") -> str:
    """A figure as a file of its own, on a ground of its own; with ``has_dark`` a dark one where the reader prefers that; ``css`` is its own style."""
    figure = str(figure)
    view_box = re.search(r'viewBox="0 0 (\S+) (\S+)"', figure)
    assert view_box
    width, height = (float(size) for size in view_box.groups())
    css = re.sub(r"light-dark\((#\w+), #\w+\)", r"\1", figure_style()) + css
    if has_dark:
        names = re.findall(r"(--[\w-]+): light-dark\(#\w+, (#\w+)\)", figure_style())
        dark = " ".join(f"{name}: {colour};" for name, colour in names)
        css += f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
    ground = tag(
        "rect", x=-MARGIN, y=-MARGIN, width=width + 2 * MARGIN, height=height + 2 * MARGIN, rx=10,
        fill="var(--ground)" if has_dark else "#ffffff",
    )  # fmt: skip
    box = f'viewBox="{-MARGIN} {-MARGIN} {width + 2 * MARGIN:.0f} {height + 2 * MARGIN:.0f}"'
    opened = figure.replace(view_box.group(), box, 1).replace('role="group"', 'role="img"', 1)
    return opened.replace(">", f"><style>{css}</style>{ground}", 1) + "\n"


def _section(summary: Summary, section: Section) -> dict[str, Any]:
    variants = [asdict(variant) for variant in section.variants]
    return {
        "name": section.name,
        "title": section.title,
        "loss_metric": section.loss_metric,
        "score": section.score,
        "higher_is_better": section.higher_is_better,
        "tasks": list(section.tasks),
        "complete_tasks": section.complete_tasks,
        "cost": "share of the reference's cache" if section.is_grid else "cached bytes per token (bf16)",
        "answer": answer(section),
        "evidence": evidence.sentences(summary, section),
        "chance": evidence.as_dict(summary, section),
        "front": [variant.name for variant in section.front],
        "front_seeds": section.front_seeds,
        "variants": variants,
        "comparisons": [
            {"within": c.quantity, "variant": c.variant.name, "other": c.other.name, "difference": asdict(c.difference)}
            for c in section.comparisons
        ],
        "controls": [
            {
                "outcome": c.quantity,
                "variant": c.variant.name,
                "other": c.other.name,
                "difference": asdict(c.difference),
                "came_out": controls.came_out(c),
                "text": controls.sentence(c, section.loss_metric),
            }
            for c in section.controls
        ],
        "choices": [choices.as_dict(choice) for choice in section.choices],
        "budgets": budgets.as_dicts(summary, section),
        "differences_shown": sum(len(group.rows) for group in differences(section)),
    }


def finite(values: Any) -> Any:
    """The same values, those that are not finite being null, as JSON has them."""
    if isinstance(values, dict):
        return {str(key): finite(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [finite(value) for value in values]
    if isinstance(values, float) and not math.isfinite(values):
        return None
    return values


def _csv(frame: pd.DataFrame) -> str:
    return str(frame.to_csv(index=False, lineterminator="\n"))
