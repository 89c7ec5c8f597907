"""What a map says: the reader's question about V = Q - K, the regions, the cliffs, and how sure all that is.

The tie of the question and the limits of a cliff were chosen before any result was known.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from twofold.plane import on_disc
from twofold.report.answer import compared
from twofold.report.numbers import decimals, metric_name, metric_unit, number, with_interval
from twofold.report.plane.sheets import BorderSummary, Place, Sheet, Step
from twofold.study.statistics import Interval, PairedDifference

FORMAT = 1
QUESTION = "V = Q - K"
HALF_CACHE = "(Q, K=V)"
MAX_CLIFFS = 10


def question(sheets: list[Sheet]) -> list[str]:
    """For each task, V = Q - K beside the reference, and beside the tie that halves the cache; in the loss."""
    sentences = []
    for sheet in sheets:
        place = sheet.place(QUESTION)
        if not sheet.is_loss or place is None or not place.difference.n:
            continue
        told = [compared(QUESTION, sheet.section.reference.label, place.difference, sheet.metric)]
        half = sheet.place(HALF_CACHE)
        if half is not None and place.minus(half).n:
            told.append(compared(QUESTION, HALF_CACHE, place.minus(half), sheet.metric))
        sentences.append(f"{sheet.section.title}: {'; '.join(told)}.")
    return sentences


def regions(sheet: Sheet) -> str:
    """The best and the worst region, and how much of the spread lies between regions."""
    if len(sheet.regions) < 2:
        return ""
    best, worst = sheet.regions[0], sheet.regions[-1]
    places = _places(sheet)
    return (
        f"Best on average are the ties where {_said(best.region)} (mean {metric_name(sheet.metric)} {number(best.mean, places)} over {_ties(best.ties)}), "
        f"worst those where {_said(worst.region)} ({number(worst.mean, places)} over {_ties(worst.ties)}); "
        f"{sheet.section.reference.label} has {with_interval(sheet.reference)}."
    )


def cliffs(sheet: Sheet) -> str:
    """How many steps are cliffs, on borders of regions and within them."""
    if not math.isfinite(sheet.chance):
        return "Too few seeds, or too few mirror images, to tell a cliff from chance yet."
    across = [step for step in sheet.steps if step.crosses_border]
    within = [step for step in sheet.steps if not step.crosses_border]
    crossing = sum(step.crosses_border for step in sheet.cliffs)
    counts = (crossing, len(sheet.cliffs) - crossing)
    return (
        f"{counts[0]} of {len(across)} steps across a border between regions are cliffs, and {counts[1]} of {len(within)} steps within a region: "
        f"they exclude zero and are larger than {number(sheet.chance, _places(sheet))} {metric_unit(sheet.metric)}, the largest difference between mirror images."
    )


def cliff(step: Step, sheet: Sheet) -> str:
    """One cliff: ``V = Q + K → V = Q - K: 0.31 bits per byte [0.25, 0.37] worse, n = 3, 35° apart``."""
    low, high = sorted((abs(step.difference.low), abs(step.difference.high)))
    places = decimals(low, high, step.size)
    kind = "across a border" if step.crosses_border else f"within a region: {_said(step.better.point.region)}"
    return (
        f"{step.better.text} → {step.worse.text}: worse by {number(step.size, places)} {metric_unit(sheet.metric)} "
        f"[{number(low, places)}, {number(high, places)}], n = {step.difference.n}, {step.degrees:.0f}° apart, {kind}"
    )


def border(summary: BorderSummary) -> str:
    """``V is a multiple of Q | V mixes Q and K with equal signs``."""
    one, other = summary.regions
    return f"within: {_said(one)}" if one is other else f"{_said(one)} | {_said(other)}"


def mirrors(sheet: Sheet) -> str:
    """The free check: ties that are one class of functions, and whether chance explains their differences."""
    shown = [step for step in sheet.mirrors if math.isfinite(step.difference.low)]
    if not shown:
        return ""
    straddling = sum(not step.difference.excludes_zero for step in shown)
    return (
        f"Of {len(shown)} pairs of mirror images, which differ by the sign of V and by nothing that can be learned, {straddling} have an interval "
        f"that holds zero; of 95% intervals about {0.95 * len(shown):.0f} should."
    )


def tip(place: Place, sheets: list[Sheet]) -> list[str]:
    """A tie in words, and what it has on every sheet."""
    tie = place.point.tie
    lines = [
        place.text,
        f"{place.point.region}",
        f"{tie.cached_tensors} cached tensor{'s' * (tie.cached_tensors > 1)} per token and head",
    ]
    for sheet in sheets:
        own = sheet.place(place.text)
        if own is not None:
            lines.append(
                f"{sheet.section.title}, {metric_name(sheet.metric)}: {with_interval(own.value)}, n = {own.value.n}"
            )
    return lines


def to_json(sheets: list[Sheet], study: str) -> dict[str, Any]:
    """Everything that the page says, for programs."""
    return {
        "format": FORMAT,
        "study": study,
        "question": {"tie": QUESTION, "sentences": question(sheets)},
        "sheets": [_sheet(sheet) for sheet in sheets],
    }


def _sheet(sheet: Sheet) -> dict[str, Any]:
    return {
        "section": sheet.section.name,
        "title": sheet.section.title,
        "metric": sheet.metric,
        "is_loss": sheet.is_loss,
        "higher_is_better": sheet.higher_is_better,
        "reference": _interval(sheet.reference),
        "chance": sheet.chance,
        "sentences": [text for text in (regions(sheet), cliffs(sheet), mirrors(sheet)) if text],
        "cliffs": [{"text": cliff(step, sheet)} | _step(step) for step in sheet.cliffs],
        "mirrors": {
            "pairs": len(sheet.mirrors),
            "straddling": sum(not step.difference.excludes_zero for step in sheet.mirrors),
        },
        "steps": len(sheet.steps),
        "regions": [asdict(summary) for summary in sheet.regions],
        "borders": [asdict(summary) for summary in sheet.borders],
        "ties": [_place(place) for place in sheet.places],
    }


def _step(step: Step) -> dict[str, Any]:
    return {
        "better": step.better.text,
        "worse": step.worse.text,
        "degrees": step.degrees,
        "crosses_border": step.crosses_border,
        "difference": _interval(step.difference),
    }


def _place(place: Place) -> dict[str, Any]:
    x, y = on_disc(place.point.direction)
    return {
        "tie": place.text,
        "numbers": list(place.point.numbers),
        "x": round(float(x), 6),
        "y": round(float(y), 6),
        "region": place.point.region.value,
        "variant": place.variant.name,
        "value": _interval(place.value),
        "difference": _interval(place.difference),
    }


def _interval(shown: Interval | PairedDifference) -> dict[str, Any]:
    return {"mean": shown.mean, "low": shown.low, "high": shown.high, "n": shown.n}


def _places(sheet: Sheet) -> int:
    """The digits that means over ties have: those of the reference's interval."""
    return decimals(sheet.reference.low, sheet.reference.high, sheet.reference.mean)


def _said(region: object) -> str:
    return str(region).partition(":")[0]


def _ties(count: int) -> str:
    return f"{count} tie{'s' * (count != 1)}"
