"""The controls of all studies counted together: is nothing found where nothing is, and something where something is.

A negative control is one model trained twice from different seeds: its 95% interval must straddle 0, which by construction it fails to do about
once in twenty times. A positive control is a model known to fail: its loss must be found larger.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from scipy import stats

from twofold.claims.kept import Kept
from twofold.claims.measured import Measured
from twofold.claims.reports import Report

RATE = 0.95


@dataclass(frozen=True, kw_only=True)
class Control:
    """One control on one task of one study. ``outcome`` is what it promised: "same" or "worse"."""

    study: str
    section: str
    outcome: str
    measured: Measured
    holds: bool


def controls(kept: Kept) -> tuple[Control, ...]:
    """Every control with an interval, of all studies that are kept."""
    reports = (kept.report(study) for study in kept.studies)
    return tuple(control for report in reports if report for control in _of_study(report))


def likelihood(held: int, total: int) -> float:
    """How often so few of ``total`` negative controls, or fewer, would straddle 0 if each did with 95%."""
    return float(stats.binom.cdf(held, total, RATE))


def _of_study(report: Report) -> Iterator[Control]:
    for section in report.values["sections"]:
        labels = {variant["name"]: variant["label"] for variant in section["variants"]}
        # A report of an earlier version has none.
        for control in section.get("controls", ()):
            if control["came_out"] is not None:
                pair = f"{labels[control['variant']]} against {labels[control['other']]}"
                yield Control(
                    study=report.study,
                    section=section["title"],
                    outcome=control["outcome"],
                    measured=report.difference(section, pair, control["difference"]),
                    holds=control["came_out"],
                )
