"""The law of the difference on the page: what was measured at each budget, the fit with its band, and the budget that it did not see."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup

from twofold.report.numbers import count, decimals, metric_name, metric_unit, number, with_interval
from twofold.report.panels import Mark, Panel, Series, XAxis, panels
from twofold.report.part import Part, Table
from twofold.report.summary import Summary
from twofold.study.law import EXPONENTS, Budget, Estimate, Law, Prediction, fit

SIZE, RATIO = "size", "ratio"
CURVE_POINTS = 40


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A variant's budgets, and their law where they are enough for one."""

    name: str
    label: str
    budgets: tuple[Budget, ...]
    law: Law | None


def part(summary: Summary) -> Part | None:
    """The part, where the plan's tasks have sizes and ratios and something is measured on them."""
    tasks = [name for name, facts in summary.shown.tasks.items() if {SIZE, RATIO} <= set(facts.points)]
    found = list(_found(summary, tasks))
    if not found:
        return None
    metric = summary.shown.tasks[tasks[0]].loss_metric
    reference = _label(summary, tasks[0], summary.plan.reference)
    return Part(
        name="law",
        title="The difference over budgets",
        sentences=[sentence for one in found for sentence in _sentences(one, reference, metric)],
        caption=f"Loss minus that of {reference}, paired by seed, with 95% t intervals. Lines are the fitted law with its 95% bootstrap band over "
        "seeds. Hollow marks were held out of the fit.",
        figure=partial(_figure, found, f"difference in {metric_name(metric)}"),
        tables=[_laws(found, metric), _observed(found, metric)],
        values={"metric": metric, "reference": summary.plan.reference, "variants": [_values(one) for one in found]},
    )


def _found(summary: Summary, tasks: Sequence[str]) -> Iterator[_Found]:
    for variant in summary.plan.variants:
        budgets = tuple(_budgets(summary, tasks, variant.name)) if variant.name != summary.plan.reference else ()
        # Two budgets of one size are a control's, not a curve.
        if len({budget.ratio for budget in budgets}) > 2:
            label = _label(summary, tasks[0], variant.name)
            yield _Found(name=variant.name, label=label, budgets=budgets, law=fit(budgets))


def _budgets(summary: Summary, tasks: Sequence[str], variant: str) -> Iterator[Budget]:
    runs = summary.shown.runs
    for task in tasks:
        metric = summary.shown.tasks[task].loss_metric
        own = summary.by_seed(task, variant, metric)
        reference = summary.by_seed(task, summary.plan.reference, metric)
        if shared := sorted(set(own) & set(reference)):
            done = runs[(runs.task == task) & (runs.variant == summary.plan.reference) & (runs.status == "done")].iloc[
                0
            ]
            yield Budget(
                parameters=float(done.parameters),
                tokens=float(done.tokens),
                differences={seed: own[seed] - reference[seed] for seed in shared},
            )


def _label(summary: Summary, task: str, variant: str) -> str:
    runs = summary.shown.runs
    own = runs[(runs.task == task) & (runs.variant == variant)].label
    return str(own.iloc[0]) if len(own) else variant


# In words


def _sentences(found: _Found, reference: str, metric: str) -> Iterator[str]:
    law = found.law
    if law is None:
        yield f"{found.label}: too few budgets are measured for a law yet."
        return
    unit = metric_unit(metric)
    limit = law.limit(law.largest)
    words = f"{found.label} minus {reference}, with tokens without end, at {count(law.largest)} parameters: {_shown(limit, unit)}"
    if math.isfinite(limit.low):
        words += ", which holds zero" if limit.holds_zero else ", which leaves zero out"
    yield f"{words} (fitted to {len(law.fitted)} budgets, n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{len(law.seeds)} seeds)."
    if law.is_pinned:
        ends = f"{EXPONENTS[0]:.1f} to {EXPONENTS[-1]:.0f}"
        yield f"Its exponent ends at an end of its range ({ends}): these budgets do not say how the difference settles, so that limit is a guess beyond them."
    if law.is_misfit:
        shown = f"{law.chi_squared:.0f} on {law.degrees} degrees of freedom"
        yield f"The budgets lie farther from that law than their noise allows (χ² of {shown}): its limit is to be read with doubt."
    for told in map(law.prediction, law.held_out):
        yield f"At {told.budget.ratio:.3g} tokens per parameter of {count(told.budget.parameters)}, which the law did not see, it says {_shown(told.predicted, unit)}; {_verdict(told)}."


def _verdict(told: Prediction) -> str:
    seen = number(told.observed, decimals(told.predicted.low, told.predicted.high, told.observed), sign=True)
    if not math.isfinite(told.predicted.low):
        return f"{seen} was seen"
    return f"{seen} was seen, {'inside' if told.is_inside else 'outside'} that interval"


def _shown(value: Estimate, unit: str = "") -> str:
    places = decimals(value.low, value.high, value.value)
    shown = number(value.value, places, sign=True) + (f" {unit}" if unit else "")
    if not math.isfinite(value.low):
        return shown
    return f"{shown} [{number(value.low, places, sign=True)}, {number(value.high, places, sign=True)}]"


# As a figure


def _figure(found: Sequence[_Found], y_title: str, width: float) -> Markup:
    sizes = sorted({budget.parameters for one in found for budget in one.budgets})
    # Steps are whole, so that 80 tokens per parameter are 79.97 at one size and 80.04 at another: one tick for both.
    ratios = sorted({float(f"{budget.ratio:.2g}") for one in found for budget in one.budgets})
    shown = [
        Panel(
            title=one.label,
            series=tuple(
                Series(
                    label=f"{count(size)} parameters",
                    colour=1 + index % 8,
                    marks=tuple(
                        _mark(one, budget) for budget in sorted(one.budgets, key=lambda b: b.ratio) if budget.parameters == size
                    ),
                    line=tuple(_curve(one.law, size, ratios)) if one.law else (),
                )
                for index, size in enumerate(sizes)
            ),
        )
        for one in found
    ]  # fmt: skip
    axis = XAxis(
        low=ratios[0] / 1.2, high=ratios[-1] * 1.2, is_log=True, ticks=tuple(ratios),
        name=lambda value: f"{value:,.4g}", title="tokens per parameter",
    )  # fmt: skip
    words = f"{y_title} against tokens per parameter for {', '.join(one.label for one in found)}; all values are in the tables below."
    return panels(shown, width, x=axis, y_title=f"{y_title} · above zero is worse", label=words, columns=2)


def _mark(found: _Found, budget: Budget) -> Mark:
    seen = budget.observed
    is_open = found.law is not None and budget in found.law.held_out
    return Mark(x=budget.ratio, mean=seen.mean, low=seen.low, high=seen.high, is_open=is_open)


def _curve(law: Law, size: float, ratios: Sequence[float]) -> Iterator[tuple[float, float, float, float]]:
    if any(math.isclose(budget.parameters, size) for budget in law.fitted):
        for ratio in np.geomspace(ratios[0], ratios[-1], CURVE_POINTS).tolist():
            value = law.at(size, ratio)
            yield ratio, value.value, value.low, value.high


# As tables and values


def _laws(found: Sequence[_Found], metric: str) -> Table:
    sizes = sorted({budget.parameters for one in found if one.law for budget in one.law.fitted})
    rows = []
    for one in found:
        if (law := one.law) is None:
            continue
        told = [law.prediction(budget) for budget in law.held_out]
        rows.append([
            one.label, *(_shown(law.limit(size)) for size in sizes), _shown(law.exponent),
            "yes" if law.has_size else "no", f"{law.chi_squared:.1f} / {law.degrees}",
            "; ".join(_shown(one_told.predicted) for one_told in told),
            "; ".join(_verdict(one_told) for one_told in told),
        ])  # fmt: skip
    return Table(
        caption=f"The fitted laws, in {metric_name(metric)}, with 95% bootstrap intervals over seeds",
        columns=["Variant", *(f"Limit, {count(size)} parameters" for size in sizes), "Exponent β", "Slope with size", "χ² / degrees of freedom",
                 "Held out: the law says", "Held out: what was seen"],
        rows=rows,
    )  # fmt: skip


def _observed(found: Sequence[_Found], metric: str) -> Table:
    cells: dict[tuple[float, float], dict[str, str]] = {}
    for one in found:
        for budget in one.budgets:
            shown = f"{with_interval(budget.observed, sign=True)}, n = {budget.observed.n}"
            cells.setdefault((budget.parameters, budget.tokens), {})[one.name] = shown
    rows = [
        [count(parameters), f"{tokens / parameters:.3g}", count(tokens), *(own.get(one.name, "") for one in found)]
        for (parameters, tokens), own in sorted(cells.items())
    ]
    columns = ["Parameters", "Tokens / parameter", "Tokens", *(one.label for one in found)]
    return Table(caption=f"What was measured: difference in {metric_name(metric)}", columns=columns, rows=rows)


def _values(found: _Found) -> dict[str, Any]:
    law = found.law
    measured = [
        {"parameters": b.parameters, "tokens": b.tokens, "tokens_per_parameter": b.ratio, "mean": b.observed.mean,
         "low": b.observed.low, "high": b.observed.high, "n": b.observed.n} for b in found.budgets
    ]  # fmt: skip
    values: dict[str, Any] = {"variant": found.name, "label": found.label, "measured": measured, "law": None}
    if law is not None:
        values["law"] = {
            "seeds": list(law.seeds), "exponent": _estimate(law.exponent), "is_pinned": law.is_pinned, "is_misfit": law.is_misfit, "has_size": law.has_size,
            "coefficients": law.coefficients[:, 0].tolist(), "chi_squared": law.chi_squared, "degrees": law.degrees, "chance": law.chance,
            "criterion": float(law.criterion), "other_criterion": float(law.other_criterion),
            "limits": [
                {"parameters": size, "holds_zero": law.limit(size).holds_zero, **_estimate(law.limit(size))}
                for size in sorted({budget.parameters for budget in law.fitted})
            ],
            "held_out": [
                {"parameters": told.budget.parameters, "tokens_per_parameter": told.budget.ratio, "observed": told.observed,
                 "is_inside": told.is_inside, **_estimate(told.predicted)} for told in map(law.prediction, law.held_out)
            ],
        }  # fmt: skip
    return values


def _estimate(value: Estimate) -> dict[str, float]:
    return {"value": value.value, "low": value.low, "high": value.high}
