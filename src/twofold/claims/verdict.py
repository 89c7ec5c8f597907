"""Verdicts, by rule and never by hand: each result is judged by its piece of evidence, each claim by its checks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from twofold.claims.claim import Claim, Evidence, Rule
from twofold.claims.kept import Kept
from twofold.claims.measured import Measured, Missing
from twofold.study.statistics import Interval, detectable_difference

Outcome = Literal["confirmed", "refuted", "undecided"]
Verdict = Literal["confirmed at this scale", "refuted at this scale", "mixed", "undecided", "not tested"]

VERDICTS: tuple[Verdict, ...] = (
    "confirmed at this scale", "refuted at this scale", "mixed", "undecided", "not tested",
)  # fmt: skip

_AT_THIS_SCALE: Mapping[Outcome, Verdict] = {"confirmed": "confirmed at this scale", "refuted": "refuted at this scale"}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One result and what its rule makes of it. ``power``: see :func:`power_of`; NaN where there is no chance in it."""

    evidence: Evidence
    measured: Measured
    outcome: Outcome
    power: float


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A claim with its checks, what is missing (a reason and a command each, once), and the verdict that follows."""

    claim: Claim
    checks: tuple[Check, ...]
    missing: tuple[tuple[str, str], ...]

    @property
    def verdict(self) -> Verdict:
        """Of what is there: all confirmed, all refuted, all undecided, or mixed."""
        outcomes = {check.outcome for check in self.checks}
        if not outcomes:
            return "not tested"
        if len(outcomes) > 1:
            return "mixed"
        (outcome,) = outcomes
        return "undecided" if outcome == "undecided" else _AT_THIS_SCALE[outcome]

    @property
    def is_partial(self) -> bool:
        """Whether the verdict rests on a part of the evidence."""
        return bool(self.checks and self.missing)

    @property
    def commands(self) -> tuple[str, ...]:
        """What makes the results, or would: each command once."""
        made = [check.measured.origin.command for check in self.checks]
        wanted = [command for _, command in self.missing]
        return tuple(dict.fromkeys(filter(None, [*made, *wanted, self.claim.test])))


def judge(claim: Claim, kept: Kept) -> Judgement:
    """The claim by the results that are kept."""
    checks: list[Check] = []
    missing: list[tuple[str, str]] = []
    for evidence in claim.evidence:
        found = kept.measure(evidence)
        if isinstance(found, Missing):
            missing.append((found.reason, evidence.command))
            continue
        for measured in found:
            power = math.nan if measured.is_exact else power_of(measured.shown)
            outcome = judged(evidence, measured)
            checks.append(Check(evidence=evidence, measured=measured, outcome=outcome, power=power))
    return Judgement(claim=claim, checks=tuple(checks), missing=tuple(dict.fromkeys(missing)))


def power_of(shown: Interval) -> float:
    """The smallest true difference that would have been seen in 80% of such studies, with this n and this spread; 0 where all seeds agree.

    The spread is estimated from the same few seeds, so this is a scale and not a bound. NaN without an interval.
    """
    if shown.n < 2:
        return math.nan
    error = (shown.high - shown.low) / 2 / float(stats.t.ppf(0.975, shown.n - 1))
    return detectable_difference(error * math.sqrt(shown.n), shown.n)


def judged(rule: Rule, measured: Measured) -> Outcome:
    """See :class:`~twofold.claims.claim.Rule`. Without an interval, or with a doubt, nothing is decided."""
    low, high = measured.shown.low, measured.shown.high
    if measured.doubt or not (math.isfinite(low) and math.isfinite(high)):
        return "undecided"
    if rule.above is not None:
        return _decided(is_true=low > rule.above, is_false=high <= rule.above)
    if rule.below is not None:
        return _decided(is_true=high < rule.below, is_false=low >= rule.below)
    if rule.between is not None:
        first, last = rule.between
        return _decided(is_true=first <= low and high <= last, is_false=high < first or low > last)
    assert rule.size is not None
    is_held = low <= rule.size <= high
    return _decided(is_true=is_held and not low <= 0 <= high, is_false=not is_held)


def _decided(*, is_true: bool, is_false: bool) -> Outcome:
    return "confirmed" if is_true else "refuted" if is_false else "undecided"


def counts(judgements: Iterable[Judgement]) -> dict[Verdict, int]:
    """How many claims have each verdict, all verdicts in their order."""
    found = [judgement.verdict for judgement in judgements]
    return {verdict: found.count(verdict) for verdict in VERDICTS}
