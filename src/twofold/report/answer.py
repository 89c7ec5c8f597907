"""The answer in plain words: never a winner without an interval, and never a subject chosen by its result.

The sentences speak of the first tie of the plan that needs a smaller cache than the reference, because choosing the best one after the
fact would favour chance; the front names the others.
"""

from __future__ import annotations

import math

from twofold.report.numbers import bounds, decimals, metric_unit, number, share
from twofold.report.summary import Section, Summary, VariantSummary
from twofold.study.statistics import PairedDifference


def answer(section: Section) -> list[str]:
    """Sentences on one section: against the reference, at equal cache, and the front. Empty before anything is measured."""
    if not section.measured:
        return []
    sentences = []
    subject = _subject(section)
    if subject is not None and subject.difference.n:
        share_of_cache = subject.cost / section.reference.cost
        sentences.append(
            f"{compared(subject.label, section.reference.label, subject.difference, section.loss_metric)}, "
            f"with {_portion(share_of_cache)} of its cache."
        )
        sentences += [
            f"At equal cache, {compared(match.variant.label, match.other.label, match.difference, section.loss_metric)}."
            for match in section.comparisons
            if match.quantity == "cache" and match.other.name == subject.name and match.difference.n
        ]
    sentences.append(_front(section))
    return sentences


def compared(a: str, b: str, difference: PairedDifference, metric: str) -> str:
    """``A is worse than B by 0.012 bits per byte [0.004, 0.020], n = 3``; lower is better.

    Without an interval, or where it holds 0, that is said first.
    """
    unit = metric_unit(metric)
    places = decimals(difference.low, difference.high, difference.mean)
    if not math.isfinite(difference.low):
        return (
            f"{a} differs from {b} by {number(difference.mean, places, sign=True)} {unit} "
            f"in the one seed that is done for both (no interval, so no verdict)"
        )
    if not difference.excludes_zero:
        return (
            f"{a} is not told apart from {b}: {number(difference.mean, places, sign=True)} {unit} "
            f"{bounds(difference, sign=True)}, n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{difference.n}"
        )
    low, high = sorted((abs(difference.low), abs(difference.high)))
    verdict = "worse" if difference.mean > 0 else "better"
    return (
        f"{a} is {verdict} than {b} by {number(abs(difference.mean), places)} {unit} "
        f"[{number(low, places)}, {number(high, places)}], n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{difference.n}"
    )


def status(summary: Summary) -> str:
    """How far the study has come, in one sentence."""
    states = summary.states
    text = f"{states['done']} of {summary.planned} runs done"
    for state, words in (("running", "under way"), ("failed", "failed"), ("pending", "still to come")):
        if states[state]:
            text += f", {states[state]} {words}"
    return text + "."


def _subject(section: Section) -> VariantSummary | None:
    cheaper = [v for v in section.variants if v.kind == "tie" and v.cost < section.reference.cost]
    return cheaper[0] if cheaper else None


def _portion(ratio: float) -> str:
    words = {0.5: "half", 0.25: "a quarter", 0.75: "three quarters", 0.125: "an eighth"}
    return words.get(round(ratio, 6), f"{ratio:.3g} times" if ratio > 1 else f"{ratio:.0%}")


def _front(section: Section) -> str:
    names = [
        variant.label + (f" ({share(variant.front_frequency)})" if math.isfinite(variant.front_frequency) else "")
        for variant in section.front
    ]
    listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    if section.front_seeds > 1:
        return f"On the Pareto front, with the share of resamples of {section.front_seeds} seeds that put them there: {listed}."
    return f"On the Pareto front so far: {listed}; too few seeds to say how surely."
