"""What a score can say at all: its chance level, its standard error over examples, and the difference that would have been seen.

Three seeds share one held-out set, so two kinds of chance are at work: the seeds' (the t interval) and the examples' (the standard error of
a share). A score is told from chance only where both exclude it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import stats

from twofold.report.numbers import metric_name, number
from twofold.report.summary import Section, Summary, VariantSummary
from twofold.study.statistics import Interval, PairedDifference, detectable_difference, share_error

POWER = 0.8
NOTHING = 1e-12  # what rounding leaves of differences that are equal
AT_CHANCE = "At chance: no information"
_TWO_SIDED = float(stats.norm.ppf(0.975))


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Of one section whose score is a share of right answers. ``largest_error`` is that of the variant where it is largest.

    ``detectable`` are the smallest true differences from the reference that would have been seen, variant by variant, least and greatest; NaN where no
    two seeds differ. ``at_chance`` are variants whose score is not above chance.
    """

    chance: float
    examples: int
    largest_error: float
    detectable: tuple[float, float]
    seeds: int
    at_chance: tuple[VariantSummary, ...]


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
    return Evidence(
        chance=facts.chance,
        examples=facts.held_out_size,
        largest_error=max(share_error(v.score.mean, facts.held_out_size) for v in section.measured),
        detectable=(min(d for d, _ in seen), max(d for d, _ in seen)) if seen else (math.nan, math.nan),
        seeds=max((n for _, n in seen), default=0),
        at_chance=tuple(v for v in section.measured if is_at_chance(v.score, facts.chance, facts.held_out_size)),
    )


def is_at_chance(score: Interval, chance: float, examples: int) -> bool:
    """Whether a score is not above ``chance``, either for the interval over seeds or for that over examples (at chance, a share's is ±1.96 errors)."""
    by_seeds = math.isfinite(score.low) and score.low <= chance
    by_examples = score.mean - chance <= _TWO_SIDED * share_error(chance, examples) if examples else False
    return score.mean <= chance or by_seeds or by_examples


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
    return told


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
