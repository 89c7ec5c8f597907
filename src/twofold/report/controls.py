"""Controls whose outcome is known before: the same model from other seeds must not differ, and what is known to fail must be worse.

Where they come out otherwise, the intervals of that section are not to be trusted as they are, or the section cannot show such a difference; so
it is said loudly.
"""

from __future__ import annotations

import math

from twofold.report.numbers import metric_unit, with_interval
from twofold.report.summary import Comparison, Section, Summary

CHANCE = 0.05  # of a 95% interval


def came_out(control: Comparison) -> bool | None:
    """Whether a control came out as it must; None where it has no interval."""
    difference = control.difference
    if not math.isfinite(difference.low):
        return None
    return difference.low > 0 if control.quantity == "worse" else not difference.excludes_zero


def sentence(control: Comparison, metric: str) -> str:
    """One control in words: what it must show, and what it shows."""
    is_negative, outcome, shown = control.quantity == "same", came_out(control), control.difference
    kind = "Negative control" if is_negative else "Positive control"
    must = "must not differ from" if is_negative else "must be worse than"
    about = f"{control.variant.label} {must} {control.other.label}"
    if not shown.n:
        return f"{kind}: {about}. No seed is done for both."
    if outcome is None:
        return f"{kind}: {about}. One seed is done for both: no interval, so no verdict."
    value = f"{with_interval(shown, sign=True)} {metric_unit(metric)}, n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{shown.n}"
    if is_negative:
        found = f"The difference is {value}: zero is " + ("inside, as it should be." if outcome else "outside.")
        failure = f"Of intervals at 95% that is to be expected of {CHANCE:.0%}, or 1 in {1 / CHANCE:.0f}."
    else:
        found = f"It is worse by {value}, as it should be." if outcome else f"The difference is {value}."
        failure = "It is not shown to be worse, so a difference of that kind cannot be seen here."
    return f"{kind}: {about}. {found}" if outcome else f"{kind.upper()} FAILED: {about}. {found} {failure}"


def sentences(section: Section) -> list[str]:
    """All controls of a section."""
    return [sentence(control, section.loss_metric) for control in section.controls]


def tally(summary: Summary) -> list[str]:
    """How many controls of the whole study came out as they must, beside the rate that chance gives; empty without controls."""
    told = []
    for outcome, kind in (("same", "Negative"), ("worse", "Positive")):
        controls = [one for section in summary.sections for one in section.controls if one.quantity == outcome]
        judged = [verdict for one in controls if (verdict := came_out(one)) is not None]
        if not controls:
            continue
        if outcome == "same":
            words = (
                f"zero is outside the interval of {judged.count(False)} of {len(judged)}; by chance alone that is to be expected of "
                f"{CHANCE:.0%} ({CHANCE * len(judged):.2g} of {len(judged)})."
            )
        else:
            words = f"{judged.count(True)} of {len(judged)} came out worse, as they must."
        without = len(controls) - len(judged)
        told.append(f"{kind} controls: {words}" + (f" {without} without an interval." if without else ""))
    return told


def failures(summary: Summary) -> list[str]:
    """The sentences of the controls that did not come out, each with its section."""
    return [
        f"{section.title}: {sentence(control, section.loss_metric)}"
        for section in summary.sections
        for control in section.controls
        if came_out(control) is False
    ]
