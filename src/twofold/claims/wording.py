"""Results, rules and verdicts in words, the same in a terminal and on a page."""

from __future__ import annotations

import math

from twofold.claims.claim import Rule
from twofold.claims.measured import Measured
from twofold.claims.verdict import Check, Judgement
from twofold.report.numbers import bounds, decimals, number, share
from twofold.study.statistics import unseen_share


def result(measured: Measured) -> str:
    """``+0.22 [+0.06, +0.38] bits per byte, n = 3``; what was counted or measured once has neither interval nor n."""
    shown, sign = measured.shown, measured.is_difference
    if measured.is_exact:
        return f"{plain_number(shown.mean)} {measured.unit}".strip()
    places = decimals(shown.low, shown.high, shown.mean)
    parts = [number(shown.mean, places, sign=sign), bounds(shown, sign=sign) or "(no interval)", measured.unit]
    seeds = f", n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{shown.n}" if shown.n else ""
    return " ".join(filter(None, parts)) + seeds


def plain_number(value: float) -> str:
    """A number without an interval: whole as it is, else four significant digits."""
    if value == int(value) and abs(value) >= 1:
        return number(value, 0)
    return number(value, max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0)


def power(check: Check) -> str:
    """The smallest difference that would have been seen, or why there is none to be told."""
    if check.measured.is_exact:
        return check.measured.shown.method or "no chance in it"
    if not math.isfinite(check.power):
        return "one seed" if check.measured.shown.n == 1 else "not known"
    if check.power == 0:
        seeds = check.measured.shown.n
        return f"all {seeds} seeds alike; of others up to {share(unseen_share(seeds))} may not be"
    return number(check.power, max(0, 1 - math.floor(math.log10(check.power))))


def rule(evidence: Rule) -> str:
    """What the result must be for the claim to be confirmed."""
    if evidence.above is not None:
        return f"above {plain_number(evidence.above)}"
    if evidence.below is not None:
        return f"below {plain_number(evidence.below)}"
    if evidence.between is not None:
        low, high = map(plain_number, evidence.between)
        return f"between {low} and {high}"
    assert evidence.size is not None
    return f"the interval holds {plain_number(evidence.size)} and not 0"


def short_result(judgement: Judgement) -> str:
    """One line: the first result, and how many others there are."""
    if not judgement.checks:
        return "no result" if judgement.missing else ""
    others = len(judgement.checks) - 1
    more = f"; {others} more" if others else ""
    return f"{result(judgement.checks[0].measured)}{more}"


def tally(judgement: Judgement) -> str:
    """The outcomes of several checks, counted: ``2 confirmed, 1 undecided``. Empty where there is at most one."""
    outcomes = [check.outcome for check in judgement.checks]
    if len(outcomes) < 2:
        return ""
    return ", ".join(f"{outcomes.count(kind)} {kind}" for kind in dict.fromkeys(outcomes))
