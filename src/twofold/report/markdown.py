"""The report as Markdown: the answer, the central table of each task, failures and provenance."""

from __future__ import annotations

from collections.abc import Sequence

from twofold.report import budgets, choices, controls, rows
from twofold.report.answer import answer, status
from twofold.report.evidence import sentences
from twofold.report.numbers import metric_name
from twofold.report.page import run_command
from twofold.report.part import Part
from twofold.report.parts import parts as of_design
from twofold.report.summary import Section, Summary

_SIGNIFICANT = str.maketrans({sign: f"\\{sign}" for sign in "\\`*_{}[]<>#|~"})


def text(summary: Summary, report_command: str) -> str:
    """The whole report."""
    plan = summary.plan
    parts = [f"# {escape(plan.title)}", escape(plan.question), f"**{status(summary)}**"]
    parts += [f"**{escape(sentence)}**" for sentence in controls.failures(summary)]
    parts += [escape(" ".join(controls.tally(summary)))] if controls.tally(summary) else []
    if summary.sections and summary.sections[0].ways:
        parts.append("![Loss against cached bytes per token](frontier.svg)")
    for part in of_design(summary):
        parts += _part(part)
    for section in summary.sections:
        parts += _section(summary, section)
    if summary.failures:
        cells = [[f.task, f.label, str(f.seed), f.error] for f in summary.failures]
        parts += ["## Failed runs", table(["Task", "Variant", "Seed", "What happened"], cells, numbers_from=2)]
    parts += [
        "## Provenance",
        f"Run with `{run_command(summary)}`, drawn by `{report_command}`.",
        table(["", ""], [list(row) for row in rows.provenance(summary)], numbers_from=2),
        "Intervals are 95% intervals of Student's t over seeds; differences are paired by seed. Where a model learns a task or does not, few seeds may all "
        "fall on one side, and more than one interval in twenty misses.",
    ]
    return "\n\n".join(parts) + "\n"


def _part(part: Part) -> list[str]:
    words = "\n".join(f"- {escape(sentence)}" for sentence in part.sentences)
    shown = [
        text
        for one in part.tables
        if one.rows
        for text in (escape(one.caption), table(one.columns, one.rows, numbers_from=1))
    ]
    return [
        f"## {escape(part.title)}",
        words,
        f"![{escape(part.title)}]({part.name}.svg)",
        escape(part.caption),
        *shown,
    ]


def _section(summary: Summary, section: Section) -> list[str]:
    about = f"{section.description} {rows.facts(summary, section)} {choices.facts(summary, section)}"
    parts = [f"## {escape(section.title)}", escape(about)]
    if not section.measured:
        return [*parts, "No run of this task has ended yet."]
    has_score = section.score != section.loss_metric
    loss, score = metric_name(section.loss_metric), metric_name(section.score)
    is_tuned = bool(section.choices)
    head = ["Variant", "Tie", *(["Chosen"] if is_tuned else []), "Parameters", rows.cost_name(section), loss, *([score] if has_score else []), f"Δ {loss}", "n",
            "On the front", "Time / run", "Failed"]  # fmt: skip
    front = {row["label"]: row for row in rows.front_rows(section)}
    cells = []
    for row in rows.variant_rows(section):
        own = front.get(row["label"])
        on_front = f"{'yes' if own['on_front'] else 'no'} ({own['frequency']})" if own else "–"
        cells.append([
            row["label"], row["tie"] or row["label"], *([row["chosen"]] if is_tuned else []), row["parameters"], row["cost"], f"{row['loss']} {row['loss_bounds']}",
            *([f"{row['score']} {row['score_bounds']}"] if has_score else []),
            f"{row['difference']} {row['difference_bounds']}", str(row["n"]), on_front, row["time"], str(row["failed"]),
        ])  # fmt: skip
    said = [*answer(section), *controls.sentences(section), *sentences(summary, section)]
    parts += ["\n".join(f"- {escape(sentence)}" for sentence in said), table(head, cells, numbers_from=2 + is_tuned)]
    parts += _budgets(summary, section)
    for group in rows.difference_rows(section)[1:]:
        shown = [[row["label"], row["mean"], row["bounds"], str(row["n"])] for row in group["rows"]]
        parts += [
            f"### {escape(group['heading'])}",
            table(["Variant", f"Δ {loss}", "95% interval", "n"], shown, numbers_from=1),
        ]
    return [*parts, f"Made by `{run_command(summary, section)}`."]


def _budgets(summary: Summary, section: Section) -> list[str]:
    found = budgets.rows(summary, section)
    if not found:
        return []
    keys = ("budget", "best", "best_cost", "best_loss", "best_share", "n", "second", "second_loss", "second_share")
    head = [
        "Cache",
        "Best",
        "needs",
        metric_name(section.loss_metric),
        "best in",
        "n",
        "Next",
        metric_name(section.loss_metric),
        "best in",
    ]
    cells = [[row[key] for key in keys] for row in found]
    return ["### What to choose", table(head, cells, numbers_from=2), escape(budgets.note(summary, section))]


def table(head: Sequence[str], cells: Sequence[Sequence[str]], *, numbers_from: int) -> str:
    """A Markdown table; columns from ``numbers_from`` on stand to the right."""
    rule = ["---" if index < numbers_from else "---:" for index in range(len(head))]
    lines = [[escape(cell) for cell in head], rule, *([escape(cell.strip()) for cell in row] for row in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape(words: str) -> str:
    """The text with every sign that Markdown reads made plain, on one line."""
    return " ".join(words.split()).translate(_SIGNIFICANT)
