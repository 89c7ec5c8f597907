"""What a score can say at all: its chance level, its standard error over examples, and the difference that would have been seen.

A guesser's score varies with the examples alone, whatever the seed, and all seeds share one held-out set. So a mean that lies above chance by more
than these examples explain is no guess: some model has learnt something. Where the interval over seeds holds chance all the same, the
seeds are too few or too different to say how much; that is said apart, and is another thing than no information.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from scipy import stats

from twofold.report.numbers import metric_name, number
from twofold.report.summary import Section, Summary, VariantSummary
from twofold.study.statistics import Interval, PairedDifference, detectable_difference, share_error

POWER = 0.8
NOTHING = 1e-12  # what rounding leaves of differences that are equal
AT_CHANCE = "At chance: no information"
UNEVEN = "Above chance on average, by seeds so different that their interval holds it"
_TWO_SIDED = float(stats.norm.ppf(0.975))


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Of one section whose score is a share of right answers. ``largest_error`` is that of the variant where it is largest.

    ``detectable`` are the smallest true differences from the reference that would have been seen, variant by variant, least and greatest; NaN where no
    two seeds differ. ``at_chance`` are variants whose score is not above chance, ``uneven`` those that are, but whose interval over seeds holds it.
    """

    chance: float
    examples: int
    largest_error: float
    detectable: tuple[float, float]
    seeds: int
    at_chance: tuple[VariantSummary, ...]
    uneven: tuple[VariantSummary, ...]


def evidence(summary: Summary, section: Section) -> Evidence | None:
    """None where the score is no share of right answers, where no chance level is known, or before anything is measured; and for a grid of tasks."""
    facts = summary.shown.tasks[section.tasks[0]]
    if facts.chance is None or section.is_grid or not section.measured:
        return None
    seen = [
        (detectable_difference(_deviation(v.score_difference), v.score_difference.n), v.score_difference.n)
        for v in section.measured
        if not v.is_reference and _deviation(v.score_difference) > NOTHING
    ]
    at_chance = [v for v in section.measured if is_at_chance(v.score, facts.chance, facts.held_out_size)]
    return Evidence(
        chance=facts.chance,
        examples=facts.held_out_size,
        largest_error=max(share_error(v.score.mean, facts.held_out_size) for v in section.measured),
        detectable=(min(d for d, _ in seen), max(d for d, _ in seen)) if seen else (math.nan, math.nan),
        seeds=max((n for _, n in seen), default=0),
        at_chance=tuple(at_chance),
        uneven=tuple(v for v in section.measured if v not in at_chance and v.score.low <= facts.chance),
    )


def is_at_chance(score: Interval, chance: float, examples: int) -> bool:
    """Whether a score is no more than guesses at ``chance`` give on so many examples (their share is ±1.96 errors); where these are not known, than the seeds tell."""
    if examples:
        return score.mean - chance <= _TWO_SIDED * share_error(chance, examples)
    return score.mean <= chance or score.low <= chance


def sentences(summary: Summary, section: Section) -> list[str]:
    """The same in words; empty where there is nothing to say."""
    found = evidence(summary, section)
    if found is None:
        return []
    score = metric_name(section.score)
    told = [f"Chance is {number(found.chance, 3)} {score}: the best guess that does not use what was asked."]
    if found.examples:
        told.append(
            f"The standard error of a score over the {found.examples:,} held-out examples is at most {number(found.largest_error, 3)}; "
            "all seeds and variants answer the same examples."
        )
    told.append(power_statement(found.detectable, found.seeds, section.reference.label))
    if found.at_chance:
        told.append(f"{AT_CHANCE}: {', '.join(variant.label for variant in found.at_chance)}.")
    if found.uneven:
        labels = ", ".join(variant.label for variant in found.uneven)
        told.append(f"{UNEVEN}: {labels}.")
    return told


def as_dict(summary: Summary, section: Section) -> dict[str, Any] | None:
    """Chance for programs; None where nothing is known of it."""
    found = evidence(summary, section)
    if found is None:
        return None
    names = {key: [variant.name for variant in getattr(found, key)] for key in ("at_chance", "uneven")}
    return {"level": found.chance, "examples": found.examples, **names}


def power_statement(detectable: tuple[float, float], seeds: int, reference: str) -> str:
    """Which true difference from ``reference`` would have been seen."""
    least, most = (number(value, 3) for value in detectable)
    if not math.isfinite(detectable[0]):
        return "No two seeds of any difference are apart, so nothing can be said of the difference that would have been seen."
    between = least if least == most else f"{least} to {most}, depending on the variant,"
    return (
        f"With {seeds} seeds a true difference of {between} from {reference} would have been seen in {POWER:.0%} of such studies "
        "(paired t, 95% interval)."
    )


def _deviation(difference: PairedDifference) -> float:
    """The standard deviation of single paired differences, from their t interval; NaN without one."""
    if difference.n < 2:
        return math.nan
    critical = float(stats.t.ppf(0.975, difference.n - 1))
    return (difference.high - difference.low) / 2 / critical * math.sqrt(difference.n)
