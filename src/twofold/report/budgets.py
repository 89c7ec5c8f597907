"""What to choose: the best variant that needs no more cache than a part of the reference's, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from twofold.report.numbers import byte_count, common_decimals, share, with_interval
from twofold.report.summary import Section, Summary, VariantSummary
from twofold.study.statistics import MAX_EXACT_RESAMPLES, best_frequency

SHARES = (1.0, 0.5, 0.25, 0.125)
# The loss of a causal model of text, for which a cache is held.
METRIC = "bits_per_byte"
ROUNDING = 1 + 1e-9


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The variants within one part of the reference's cache, best mean loss first; ``frequency`` is the share of resamples in which each is best.

    ``cost`` is in the section's own unit. ``seeds`` are those that all of them hold, from which the resamples are drawn.
    """

    share: float
    cost: float
    variants: tuple[VariantSummary, ...]
    frequency: dict[str, float]
    seeds: int


def budgets(summary: Summary, section: Section) -> tuple[Budget, ...]:
    """One for each of SHARES; none where a section is no text, or before anything is measured."""
    if section.loss_metric != METRIC or not section.ways:
        return ()
    by_seed = summary.values(section, section.loss_metric)
    found = []
    for part in SHARES:
        cost = part * section.reference.cost
        within = sorted((v for v in section.ways if v.cost <= cost * ROUNDING), key=lambda v: v.loss.mean)
        values = {variant.name: by_seed[variant.name] for variant in within}
        shared = set.intersection(*(set(own) for own in values.values())) if values else set()
        found.append(
            Budget(share=part, cost=cost, variants=tuple(within), frequency=best_frequency(values), seeds=len(shared))
        )
    return tuple(found)


def rows(summary: Summary, section: Section) -> list[dict[str, str]]:
    """The table, ready to be shown."""
    found = budgets(summary, section)
    places = common_decimals(budget.variants[0].loss for budget in found if budget.variants)
    return [_row(section, budget, places) for budget in found]


def _row(section: Section, budget: Budget, places: int | None) -> dict[str, str]:
    row = {"budget": f"{budget.share * 100:.4g}%", "bytes": "" if section.is_grid else byte_count(budget.cost)}
    for place, key in enumerate(("best", "second")):
        variant = budget.variants[place] if len(budget.variants) > place else None
        row |= {
            key: variant.label if variant else "nothing measured needs so little" if key == "best" else "–",
            f"{key}_cost": _cost(section, variant) if variant else "–",
            f"{key}_loss": with_interval(variant.loss, places) if variant else "–",
            f"{key}_share": ("alone" if len(budget.variants) == 1 else share(budget.frequency[variant.name]))
            if variant
            else "–",
        }
    return row | {"n": str(budget.variants[0].loss.n) if budget.variants else "–"}


def _cost(section: Section, variant: VariantSummary) -> str:
    return f"{variant.cost / section.reference.cost * 100:.3g}%"


def as_dicts(summary: Summary, section: Section) -> list[dict[str, Any]]:
    """The same for programs."""
    return [
        {
            "share_of_reference": budget.share,
            "cost": budget.cost,
            "seeds": budget.seeds,
            "variants": [
                {"variant": v.name, "cost": v.cost, "loss": v.loss.mean, "low": v.loss.low, "high": v.loss.high, "n": v.loss.n,
                 "best_in_resamples": budget.frequency[v.name]}
                for v in budget.variants
            ],
        }
        for budget in budgets(summary, section)
    ]  # fmt: skip


def alike(seeds: int) -> float:
    """How often one of two equal variants is the better in each of so many seeds, and so in all of their resamples, among which each seed is alone once.

    >>> alike(3), alike(5)
    (0.25, 0.0625)
    """
    return 2.0 ** (1 - seeds)


def note(summary: Summary, section: Section) -> str:
    """What the shares of the table rest on."""
    seeds = [budget.seeds for budget in budgets(summary, section) if budget.variants]
    fewest = min(seeds, default=0)
    if fewest < 2:
        return "Too few seeds are done for all variants to say how surely the first is the best."
    told = (
        f"Chosen by its result, so its loss flatters it a little; “best in” is the share of bootstrap resamples of {fewest} seeds "
        "in which it has the lowest mean among all that need no more."
    )
    if fewest**fewest > MAX_EXACT_RESAMPLES:
        return told
    return f"{told} Of two that are alike in truth, one is the best in all resamples of {fewest} seeds in {share(alike(fewest))} of studies."
