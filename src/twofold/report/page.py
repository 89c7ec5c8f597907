"""The page: one HTML file with everything in it, which works when it is opened as a file, without a network, and without scripts."""

from __future__ import annotations

import base64
import gzip
import json
import shlex
from collections.abc import Mapping
from typing import Any

from twofold.report import budgets, choices, controls, rows
from twofold.report.answer import answer, status
from twofold.report.assets import environment, text_of
from twofold.report.curves import Curve, CurveSet, curves
from twofold.report.evidence import sentences
from twofold.report.forest import forest
from twofold.report.frontier import frontier, outliers
from twofold.report.lines import lines, style
from twofold.report.numbers import duration, metric_name
from twofold.report.parts import parts
from twofold.report.summary import Section, Summary

WIDE, NARROW = 880, 344
MAX_FULL_ANSWERS = 3  # with more sections, the top says the first sentence of each
MAX_EMBEDDED_BYTES = 1_500_000
RELOAD_SECONDS = {"running": 10, "stopped": 60}

FILE_WORDS = {
    "runs.csv": "every run: scores, parameters, cache, time, status",
    "curves.csv": "every logged value of every run",
    "differences.csv": "paired differences with t and bootstrap intervals",
    "report.json": "all of the above that is summary, for programs",
    "report.md": "this report as text",
    "frontier.svg": "the central figure of the first task",
    "plane.html": "the plane of ties, a map to go about in",
    "plane.svg": "the map as a picture",
    "plane.json": "what the map says, for programs",
}
FILE_TYPES = {
    "csv": "text/csv",
    "json": "application/json",
    "md": "text/markdown",
    "svg": "image/svg+xml",
    "html": "text/html",
}


def html(summary: Summary, files: Mapping[str, str], report_command: str) -> str:
    """The whole page. ``files`` are the tables beside it, which it also holds where they are not too large."""
    is_long = len(summary.sections) > MAX_FULL_ANSWERS
    views = [_view(summary, section, is_one_of_many=is_long) for section in summary.sections]
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            plan=summary.plan,
            css=text_of("figure.css") + text_of("style.css"),
            theme_js=text_of("theme.js"),
            furniture_js=text_of("furniture.js"),
            page_js=text_of("page.js"),
            reload_seconds=_reload_seconds(summary),
            meter=[
                (state, summary.states[state])
                for state in ("done", "running", "failed", "pending")
                if summary.states[state]
            ],
            status=status(summary),
            standing=_standing(summary),
            is_mixed=rows.is_mixed(summary),
            control_failures=controls.failures(summary),
            control_tally=controls.tally(summary),
            answers=[view for view in views if view["answer"]],
            overview=rows.overview(summary),
            sections=views,
            parts=[{"part": part, "wide": part.figure(WIDE), "narrow": part.figure(NARROW)} for part in parts(summary)],
            failures=rows.failure_rows(summary),
            run_command=run_command(summary),
            report_command=report_command,
            provenance=rows.provenance(summary),
            plan_json=json.dumps(summary.plan.to_dict(), indent=2, ensure_ascii=False),
            hashes=rows.hashes(summary),
            files=[_file(name, content) for name, content in files.items()],
        )
    )


def run_command(summary: Summary, section: Section | None = None) -> str:
    """The command that makes the study's runs again, or those of one section."""
    words = shlex.split(str(summary.results.provenance.get("command") or f"twofold study run {summary.plan.name}"))
    # A study may have been begun with a part of itself.
    whole = [word for before, word in zip(["", *words], words, strict=False) if "--only" not in (before, word)]
    if section is not None and len(summary.sections) > 1:
        whole += ["--only", section.name]
    return shlex.join(whole)


def figure_style() -> str:
    """The style of figures that stand alone: light, so that it reads on any ground."""
    return text_of("figure.css")


def _view(summary: Summary, section: Section, *, is_one_of_many: bool) -> dict[str, Any]:
    shown = None if section.is_grid else curves(summary, section)
    view: dict[str, Any] = {
        "id": rows.section_id(section),
        "section": section,
        "facts": rows.facts(summary, section),
        "answer": answer(section),
        "evidence": sentences(summary, section),
        "tuning": choices.facts(summary, section),
        "controls": [
            (controls.sentence(c, section.loss_metric), controls.came_out(c) is False) for c in section.controls
        ],
        "budgets": budgets.rows(summary, section),
        "budget_note": budgets.note(summary, section),
        "headline": answer(section)[: 1 if is_one_of_many else None],
        "command": run_command(summary, section),
        "cost_name": rows.cost_name(section),
        "loss_name": metric_name(section.loss_metric),
        "score_name": metric_name(section.score),
        "has_score": section.score != section.loss_metric,
        "rows": rows.variant_rows(section),
        "front_rows": rows.front_rows(section),
        "curves": [] if shown is None else _curve_panels(section, shown),
        "curve_tables": [] if shown is None else rows.curve_tables(section, shown),
        "legend": [{"name": v.name, "label": v.label, "style": style(v)} for v in section.variants],
        "differences": rows.difference_rows(section),
        "grid": rows.grid(summary, section) if section.is_grid else None,
    }
    if section.ways:
        view |= {
            "outliers": outliers(section),
            "frontier_wide": frontier(section, WIDE),
            "frontier_narrow": frontier(section, NARROW, 340),
        }
    if view["differences"]:
        view |= {"forest_wide": forest(section, WIDE), "forest_narrow": forest(section, NARROW)}
    return view


def _curve_panels(section: Section, shown: CurveSet) -> list[dict[str, Any]]:
    """Held out, training, and held out minus the reference: whichever has anything to show."""
    held_out, train = metric_name(section.loss_metric), metric_name(shown.metric)
    reference = section.reference.label
    candidates: list[tuple[str, str, str, tuple[Curve, ...]]] = [
        ("held_out", "Held out", f"{held_out}, held out", shown.held_out),
        ("train", "Training", f"{train}, training batches", shown.train),
        (
            "difference",
            "Minus reference",
            f"{held_out}, held out, minus {reference}’s (paired by seed)",
            shown.difference,
        ),
    ]
    return [_panel(section, *candidate) for candidate in candidates if candidate[3]]


def _panel(section: Section, key: str, name: str, title: str, shown: tuple[Curve, ...]) -> dict[str, Any]:
    variants = {variant.name: variant for variant in section.variants}
    seeds = sorted({curve.n for curve in shown})
    n = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    hint = " Bands of two seeds would cover each other: point at a name above to see its own." if seeds[0] == 2 else ""
    words = ""
    if key == "difference":
        words = "Below zero is better than the reference at that moment. The axis is fitted to the last three quarters; what lies beyond is cut off. "
    return {
        "key": key,
        "name": name,
        "caption": f"{words}n = {n} seed{'s' * (n != '1')}.{hint}",
        "wide": lines(shown, variants, title, WIDE, has_zero=key == "difference", name=f"{section.name}-{key}"),
        "narrow": lines(shown, variants, title, NARROW, has_zero=key == "difference", name=f"{section.name}-{key}"),
    }


def _reload_seconds(summary: Summary) -> int:
    if summary.is_complete:
        return 0
    return RELOAD_SECONDS["running" if summary.is_running else "stopped"]


def _standing(summary: Summary) -> str:
    """What is to be done, or waited for."""
    if summary.is_complete:
        return "The study is complete."
    if not summary.is_running:
        return "Nobody is running it now; the same command goes on where it stopped." if summary.states["done"] else ""
    seconds = [v.seconds for section in summary.sections for v in section.variants if v.done]
    workers = rows.workers(summary)
    if not seconds or not workers:
        return ""
    left = (summary.states["pending"] + summary.states["running"] / 2) * sum(seconds) / len(seconds) / workers
    return f"About {duration(left)} left, by the mean time of the runs that are done."


def _file(name: str, content: str) -> dict[str, Any]:
    packed = gzip.compress(content.encode(), mtime=0) if len(content) < 40 * MAX_EMBEDDED_BYTES else b""
    embedded = 0 < len(packed) <= MAX_EMBEDDED_BYTES
    return {
        "name": name,
        "words": FILE_WORDS.get(name, "a figure of this page"),
        "type": FILE_TYPES[name.rpartition(".")[2]],
        "embedded": embedded,
        "content": base64.b64encode(packed).decode() if embedded else "",
    }
