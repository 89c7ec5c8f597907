"""The results that a folder keeps, read for claims: reports of studies, rows of benchmarks, and other values.

    NAME/report.json, NAME/runs.csv     a study's report, as ``twofold study run`` writes it
    NAME.json                           a list of rows, as ``benchmarks/NAME.py --json`` prints it

Nothing is computed anew where the report says it already; a pair or a score that it does not hold is paired by seed from runs.csv.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd

from twofold.claims.claim import CountedEvidence, Evidence, RowEvidence, StudyEvidence, ValueEvidence
from twofold.claims.counted import counted
from twofold.errors import TwofoldError
from twofold.report.numbers import metric_name, metric_unit
from twofold.study.statistics import Interval, interval, paired_difference


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a result came from. ``page`` is what a reader opens, relative to the folder of results; ``digest`` is of the file that was read."""

    command: str
    page: str = ""
    digest: str = ""
    code: str = ""
    data: str = ""
    machine: str = ""
    state: str = ""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One result: ``what`` in words, the mean with its interval, and its unit. ``is_exact``: counted or measured once, so without chance."""

    what: str
    shown: Interval
    unit: str
    origin: Origin
    is_exact: bool = False
    is_difference: bool = True


@dataclass(frozen=True, kw_only=True)
class Missing:
    """Why there is no result yet."""

    reason: str


class Kept:
    """The results in ``folder``; where there is no such folder there are none. Every file is read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._files: dict[str, tuple[Any, str]] = {}
        self._runs: dict[str, pd.DataFrame] = {}

    @property
    def studies(self) -> tuple[str, ...]:
        """The studies whose reports are kept, by name."""
        return tuple(sorted(path.parent.name for path in self.folder.glob("*/report.json")))

    def report(self, study: str) -> Mapping[str, Any] | None:
        """A study's report; None where none is kept."""
        report = self._read(f"{study}/report.json")
        return None if report is None else _object(report, self.folder / study / "report.json")

    def measure(self, evidence: Evidence) -> tuple[Measured, ...] | Missing:
        """What the results say. Raises TwofoldError for a file that cannot be read as what it should be."""
        if isinstance(evidence, StudyEvidence):
            return self._of_study(evidence)
        if isinstance(evidence, RowEvidence):
            return self._of_row(evidence)
        if isinstance(evidence, ValueEvidence):
            return self._of_value(evidence)
        return (_of_count(evidence),)

    # Studies

    def difference(
        self, report: Mapping[str, Any], section: Mapping[str, Any], pair: str, values: Mapping[str, Any]
    ) -> Measured:
        """A difference in loss as a report's section holds it, between the two that ``pair`` names."""
        return Measured(
            what=f"{section['title']}: {pair}",
            shown=_interval(values),
            unit=metric_unit(section["loss_metric"]),
            origin=self._origin(report, section),
        )

    def _of_study(self, evidence: StudyEvidence) -> tuple[Measured, ...] | Missing:
        report = self.report(evidence.study)
        if report is None:
            return Missing(reason=f"no result of the study {evidence.study} is kept")
        try:
            sections = [s for s in report["sections"] if fnmatchcase(s["name"], evidence.section)]
            if not sections:
                return Missing(reason=f"{evidence.study} has no task {evidence.section!r} in its report")
            found = [measured for section in sections for measured in self._of_section(evidence, report, section)]
        except (LookupError, TypeError) as error:
            place = self.folder / evidence.study / "report.json"
            raise TwofoldError(f"{place} is not a report that this version reads ({error!r}): make it again.") from None
        if not found:
            pair = " and ".join(filter(None, (evidence.variant, evidence.against)))
            return Missing(reason=f"{evidence.study} has not measured {pair} on {evidence.section!r} yet")
        return tuple(found)

    def _of_section(
        self, evidence: StudyEvidence, report: Mapping[str, Any], section: Mapping[str, Any]
    ) -> Iterator[Measured]:
        reference = next(v["name"] for v in section["variants"] if v["is_reference"])
        variants = {v["name"]: v for v in section["variants"]}
        against = evidence.against or reference
        if not {evidence.variant, against} <= set(variants):
            return
        shown = self._shown(evidence, section, variants, against)
        if not shown.n:
            return
        is_difference = "difference" in evidence.measure
        labels = [variants[name]["label"] for name in (evidence.variant, against)]
        yield Measured(
            what=f"{section['title']}: {' against '.join(labels) if is_difference else labels[0]}",
            shown=shown,
            unit=_unit(evidence, section),
            origin=self._origin(report, section),
            is_exact=evidence.measure == "cache ratio",
            is_difference=is_difference,
        )

    def _shown(
        self, evidence: StudyEvidence, section: Mapping[str, Any], variants: Mapping[str, Any], against: str
    ) -> Interval:
        own, other = variants[evidence.variant], variants[against]
        if evidence.measure == "cache ratio":
            return exact(own["cost"] / other["cost"])
        if evidence.measure == "score":
            return self._score(evidence, section, own)
        field = "score_difference" if evidence.measure == "score difference" else "difference"
        if evidence.metric or not (other["is_reference"] or field == "difference"):
            return self._paired(evidence, section, against)
        found = own[field] if other["is_reference"] else _compared(section, evidence.variant, against)
        shown = _interval(found) if found else self._paired(evidence, section, against)
        return _scaled(shown, 100 / other["loss"]["mean"]) if evidence.measure == "relative loss difference" else shown

    def _score(self, evidence: StudyEvidence, section: Mapping[str, Any], own: Mapping[str, Any]) -> Interval:
        if not evidence.metric:
            return _interval(own["score"])
        return interval(list(self._by_seed(evidence, section, evidence.variant, evidence.metric).values()))

    def _paired(self, evidence: StudyEvidence, section: Mapping[str, Any], against: str) -> Interval:
        metric = evidence.metric or (
            section["score"] if evidence.measure == "score difference" else section["loss_metric"]
        )
        own, other = (self._by_seed(evidence, section, name, metric) for name in (evidence.variant, against))
        found = paired_difference(own, other)
        return Interval(mean=found.mean, low=found.low, high=found.high, n=found.n, method=found.method)

    def _by_seed(
        self, evidence: StudyEvidence, section: Mapping[str, Any], variant: str, metric: str
    ) -> dict[int, float]:
        """A variant's value per seed: of a grid the mean over its tasks, of those seeds that have ended them all."""
        runs = self._table(evidence.study)
        column = f"score:{metric}"
        if column not in runs:
            return {}
        tasks = _own_tasks(section, variant)
        done = runs[(runs.status == "done") & (runs.variant == variant) & runs.task.isin(tasks)]
        by_seed: dict[int, list[float]] = {}
        for seed, value in zip(done.seed, done[column], strict=True):
            by_seed.setdefault(int(seed), []).extend([float(value)] if math.isfinite(value) else [])
        return {seed: sum(values) / len(tasks) for seed, values in by_seed.items() if len(values) == len(tasks)}

    def _table(self, study: str) -> pd.DataFrame:
        if study not in self._runs:
            path = self.folder / study / "runs.csv"
            try:
                self._runs[study] = pd.read_csv(path)
            except (OSError, ValueError) as error:
                raise TwofoldError(
                    f"{path} cannot be read ({' '.join(str(error).split())}): make the report again."
                ) from None
        return self._runs[study]

    def _origin(self, report: Mapping[str, Any], section: Mapping[str, Any]) -> Origin:
        study, provenance = report["study"], report["provenance"]
        hashes = report.get("data_hashes", {})
        data = sorted({hashes[task][:12] for task in section["tasks"] if task in hashes})
        code = f"{provenance.get('git_commit', '')[:10]} (sources {provenance.get('code_hash', '')[:12]})".strip()
        hardware = provenance.get("hardware", {})
        machine = ", ".join(
            [f"{hardware.get('cpu', 'unknown')}, {hardware.get('cores', '?')} cores", *hardware.get("gpus", ())]
        )
        return Origin(
            command=report["commands"]["run"],
            page=f"{study}/report.md",
            digest=self._files[f"{study}/report.json"][1],
            code=code,
            data=data[0] if len(data) == 1 else f"{len(data)} data sets, the first {data[0]}" if data else "",
            machine=machine,
            state="" if report["status"]["is_complete"] else report["status"]["text"],
        )

    # Other files

    def _of_row(self, evidence: RowEvidence) -> tuple[Measured, ...] | Missing:
        name = f"{evidence.benchmark}.json"
        rows = self._read(name)
        if rows is None:
            return Missing(reason=f"no result of the benchmark {evidence.benchmark} is kept")
        if not isinstance(rows, list) or not all(
            isinstance(row, dict) and {"name", "value", "unit"} <= row.keys() for row in rows
        ):
            raise TwofoldError(f"{self.folder / name} holds no rows of a benchmark: make it again with --json.")
        row = next((row for row in rows if row["name"] == evidence.row), None)
        if row is None:
            return Missing(reason=f"{name} has no row {evidence.row!r}")
        origin = Origin(command=evidence.command, page=name, digest=self._files[name][1])
        shown = exact(float(row["value"]))
        return (
            Measured(
                what=evidence.row, shown=shown, unit=row["unit"], origin=origin, is_exact=True, is_difference=False
            ),
        )

    def _of_value(self, evidence: ValueEvidence) -> tuple[Measured, ...] | Missing:
        value = self._read(evidence.file)
        if value is None:
            return Missing(reason=f"{evidence.file} is not kept")
        for key in evidence.at:
            if isinstance(value, list):
                value = next((item for item in value if isinstance(item, dict) and item.get("name") == key), None)
            else:
                value = value.get(key) if isinstance(value, dict) else None
            if value is None:
                return Missing(reason=f"{evidence.file} has no {'.'.join(evidence.at)}")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        try:
            shown = exact(float(value)) if is_number else _interval(value)
        except (LookupError, TypeError):
            raise TwofoldError(
                f"{self.folder / evidence.file} holds neither a number nor a mean with its interval at {'.'.join(evidence.at)}: make it again."
            ) from None
        origin = Origin(command=evidence.command, page=evidence.file, digest=self._files[evidence.file][1])
        return (
            Measured(
                what=evidence.what,
                shown=shown,
                unit=evidence.unit,
                origin=origin,
                is_exact=is_number,
                is_difference=False,
            ),
        )

    def _read(self, name: str) -> Any:
        """A file's JSON; None where there is no such file. Raises TwofoldError where it is not JSON."""
        if name not in self._files:
            path = self.folder / name
            try:
                text = path.read_bytes()
                self._files[name] = json.loads(text), sha256(text).hexdigest()[:12]
            except FileNotFoundError:
                self._files[name] = None, ""
            except (OSError, ValueError) as error:
                raise TwofoldError(
                    f"{path} cannot be read as JSON ({' '.join(str(error).split())}): make it again."
                ) from None
        return self._files[name][0]


def exact(value: float) -> Interval:
    """A number without chance."""
    return Interval(mean=value, low=value, high=value, n=1, method="")


def _of_count(evidence: CountedEvidence) -> Measured:
    what, value, unit = counted(evidence)
    origin = Origin(command=evidence.command)
    return Measured(what=what, shown=exact(value), unit=unit, origin=origin, is_exact=True, is_difference=False)


def _own_tasks(section: Mapping[str, Any], variant: str) -> list[str]:
    """The tasks whose runs are the section's: of tuned axes only the variant's chosen points."""
    chosen = [
        choice["task"] for choice in section.get("choices", ()) if choice["variant"] == variant and choice["task"]
    ]
    return chosen or list(section["tasks"])


def _compared(section: Mapping[str, Any], variant: str, against: str) -> Mapping[str, Any] | None:
    """The report's own difference of a pair, turned round where it has it the other way."""
    for pair in section["comparisons"]:
        if (pair["variant"], pair["other"]) == (variant, against):
            return dict(pair["difference"])
        if (pair["variant"], pair["other"]) == (against, variant):
            found = pair["difference"]
            turned = {"mean": found["mean"], "low": found["high"], "high": found["low"]}
            return found | {name: None if value is None else -value for name, value in turned.items()}
    return None


def _interval(values: Mapping[str, Any]) -> Interval:
    """An interval as JSON holds it; what has no value is null there."""
    mean, low, high = (math.nan if values[name] is None else float(values[name]) for name in ("mean", "low", "high"))
    return Interval(mean=mean, low=low, high=high, n=int(values["n"]), method=values.get("method", ""))


def _scaled(shown: Interval, factor: float) -> Interval:
    return Interval(
        mean=shown.mean * factor, low=shown.low * factor, high=shown.high * factor, n=shown.n, method=shown.method
    )


def _unit(evidence: StudyEvidence, section: Mapping[str, Any]) -> str:
    if evidence.measure == "cache ratio":
        return "of the cache"
    if evidence.measure == "relative loss difference":
        return "% of the loss"
    if evidence.metric:
        return metric_name(evidence.metric)
    return (
        metric_unit(section["loss_metric"]) if evidence.measure == "loss difference" else metric_name(section["score"])
    )


def _object(value: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not {"study", "sections", "status", "commands", "provenance"} <= value.keys():
        raise TwofoldError(f"{path} is not a study's report: make it again with `twofold study report`.")
    return dict(value)
