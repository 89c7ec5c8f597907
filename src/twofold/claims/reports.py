"""Numbers out of a study's report.

The report's own numbers are taken where it has them. A pair, a score or a single point of a grid that it does not tell apart is paired by seed from
its runs.csv, by the rule that the report itself follows: of several tasks a seed's value is the mean over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import pandas as pd

from twofold.claims.claim import StudyEvidence
from twofold.claims.measured import Measured, Missing, Origin, exact, from_json, scaled, turned
from twofold.report.numbers import metric_name, metric_unit
from twofold.study.statistics import Interval, PairedDifference, interval, paired_difference

Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report's JSON, the first digits of that file's hash, and how to read the runs beside it."""

    values: Values
    digest: str
    runs: Callable[[], pd.DataFrame]

    @property
    def study(self) -> str:
        """The study's name."""
        return str(self.values["study"])

    def origin(self, section: Values | None = None) -> Origin:
        """Where the numbers of one of its sections, or of the whole, came from."""
        # A tuned section goes by the name of its setting, its data by those of the points.
        tasks = [*section["tasks"], *(choice["task"] for choice in section.get("choices", ()))] if section else []
        provenance, hashes = self.values["provenance"], self.values.get("data_hashes", {})
        data = sorted({hashes[task][:12] for task in tasks if task in hashes})
        hardware = provenance.get("hardware", {})
        machine = [
            f"{hardware.get('cpu', 'unknown')}, {hardware.get('cores', '?')} cores", *hardware.get("gpus", ()),
        ]  # fmt: skip
        return Origin(
            command=self.values["commands"]["run"],
            page=f"{self.study}/report.md",
            digest=self.digest,
            code=f"{provenance.get('git_commit', '')[:10]} (sources {provenance.get('code_hash', '')[:12]})".strip(),
            data=data[0] if len(data) == 1 else f"{len(data)} sets, the first {data[0]}" if data else "",
            machine=", ".join(machine),
            state="" if self.values["status"]["is_complete"] else self.values["status"]["text"],
            caution=_caution(section or {}),
        )

    def difference(self, section: Values, pair: str, values: Values) -> Measured:
        """A difference in loss as a section holds it, between the two that ``pair`` names."""
        return Measured(
            what=f"{section['title']}: {pair}",
            shown=from_json(values),
            unit=metric_unit(section["loss_metric"]),
            origin=self.origin(section),
        )

    def measure(self, evidence: StudyEvidence) -> tuple[Measured, ...] | Missing:
        """One result for each section that fits."""
        sections = list(_sections(self.values, evidence.section))
        if not sections:
            return Missing(reason=f"{self.study} has no task {evidence.section!r} in its report")
        found = tuple(measured for section in sections if (measured := self._of_section(evidence, section)))
        if found:
            return found
        pair = " and ".join(filter(None, (evidence.variant, evidence.against)))
        return Missing(reason=f"{self.study} has not measured {pair} on {evidence.section!r} yet")

    def _of_section(self, evidence: StudyEvidence, section: Values) -> Measured | None:
        variants = {variant["name"]: variant for variant in section["variants"]}
        against = evidence.against or next(name for name, variant in variants.items() if variant["is_reference"])
        if not {evidence.variant, against} <= set(variants):
            return None
        shown = self._shown(evidence, section, variants[evidence.variant], variants[against])
        if not shown.n:
            return None
        is_difference = "difference" in evidence.measure
        labels = [variants[name]["label"] for name in (evidence.variant, against)]
        return Measured(
            what=f"{section['title']}: {' against '.join(labels) if is_difference else labels[0]}"
            + (f", minus that on {evidence.minus}" if evidence.minus else ""),
            shown=shown,
            unit=_unit(evidence, section),
            origin=self.origin(section),
            is_exact=evidence.measure == "cache ratio",
            is_difference=is_difference,
            doubt=_guesses(evidence, section, against),
        )

    def _shown(self, evidence: StudyEvidence, section: Values, own: Values, other: Values) -> Interval:
        if evidence.minus:
            return self._growth(evidence, section, own["name"], other["name"])
        is_told = section["is_whole"] and not evidence.metric
        loss, score = section["loss_metric"], evidence.metric or section["score"]
        if evidence.measure == "cache ratio":
            return exact(own["cost"] / other["cost"])
        if evidence.measure == "score":
            return from_json(own["score"]) if is_told else self._mean(section, own["name"], score)
        if evidence.measure == "score difference":
            is_told = is_told and other["is_reference"]
            return from_json(own["score_difference"]) if is_told else self._paired(section, own, other, score)
        told = _difference(section, own, other) if is_told else None
        shown = told or self._paired(section, own, other, loss)
        if evidence.measure == "loss difference":
            return shown
        size = from_json(other["loss"]) if is_told else self._mean(section, other["name"], loss)
        return scaled(shown, 100 / size.mean) if size.n else shown

    def _growth(self, evidence: StudyEvidence, section: Values, own: str, other: str) -> Interval:
        """The difference here minus that on another task, by seed."""
        before = next(iter(_sections(self.values, evidence.minus)), None)
        metric = evidence.metric or section["score" if evidence.measure == "score difference" else "loss_metric"]
        if before is None or evidence.measure not in ("loss difference", "score difference"):
            return interval([])
        here, there = (
            {seed: ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()}
            for ours, theirs in ((self._by_seed(at, name, metric) for name in (own, other)) for at in (section, before))
        )
        return _plain(paired_difference(here, there))

    def _mean(self, section: Values, variant: str, metric: str) -> Interval:
        return interval(list(self._by_seed(section, variant, metric).values()))

    def _paired(self, section: Values, own: Values, other: Values, metric: str) -> Interval:
        return _plain(paired_difference(*(self._by_seed(section, variant["name"], metric) for variant in (own, other))))

    def _by_seed(self, section: Values, variant: str, metric: str) -> dict[int, float]:
        """A variant's value per seed, of those seeds that have ended all of the section's tasks; of tuned axes the variant's chosen points."""
        runs, column = self.runs(), f"score:{metric}"
        if column not in runs:
            return {}
        chosen = [choice["task"] for choice in section.get("choices", ()) if choice["variant"] == variant]
        tasks = [task for task in chosen if task] or list(section["tasks"])
        done = runs[(runs.status == "done") & (runs.variant == variant) & runs.task.isin(tasks)]
        by_seed: dict[int, list[float]] = {}
        for seed, value in zip(done.seed, done[column], strict=True):
            by_seed.setdefault(int(seed), []).extend([float(value)] if math.isfinite(value) else [])
        return {seed: sum(values) / len(tasks) for seed, values in by_seed.items() if len(values) == len(tasks)}


def _caution(section: Values) -> str:
    """The controls of a section that did not come out as promised. A report of an earlier version has none."""
    labels = {variant["name"]: variant["label"] for variant in section.get("variants", ())}
    failed = [labels[control["variant"]] for control in section.get("controls", ()) if control["came_out"] is False]
    return f"not as promised on {section['title']}: the control {' and '.join(failed)}" if failed else ""


def _guesses(evidence: StudyEvidence, section: Values, against: str) -> str:
    """Why a difference of scores says nothing: both are those of guessers. A report of an earlier version does not say who guesses."""
    at_chance = (section.get("chance") or {}).get("at_chance", ())
    is_score = evidence.measure == "score difference" and not evidence.metric
    return "both are at chance: no information" if is_score and {evidence.variant, against} <= set(at_chance) else ""


def _sections(report: Values, pattern: str) -> Iterator[Values]:
    """The sections whose names fit; where none does, the tasks inside sections of several."""
    whole = [section for section in report["sections"] if fnmatchcase(section["name"], pattern)]
    yield from ({**section, "is_whole": True} for section in whole)
    for section in () if whole else report["sections"]:
        for task in section["tasks"]:
            if fnmatchcase(task, pattern):
                point = task.removeprefix(section["name"]).lstrip("-").replace("-", ", ")
                title = ", ".join(filter(None, (section["title"], point)))
                yield {**section, "name": task, "title": title, "tasks": [task], "is_whole": False}


def _difference(section: Values, own: Values, other: Values) -> Interval | None:
    """The report's own difference in loss of a pair, turned round where it has it the other way."""
    if other["is_reference"]:
        return from_json(own["difference"])
    for pair in section["comparisons"]:
        if (pair["variant"], pair["other"]) == (own["name"], other["name"]):
            return from_json(pair["difference"])
        if (pair["variant"], pair["other"]) == (other["name"], own["name"]):
            return turned(from_json(pair["difference"]))
    return None


def _plain(found: PairedDifference) -> Interval:
    return Interval(mean=found.mean, low=found.low, high=found.high, n=found.n, method=found.method)


def _unit(evidence: StudyEvidence, section: Values) -> str:
    if evidence.measure == "cache ratio":
        return "of the cache"
    if evidence.measure == "relative loss difference":
        return "% of the loss"
    if evidence.measure == "loss difference":
        return metric_unit(section["loss_metric"])
    return metric_name(evidence.metric or section["score"])
