"""The results that a folder keeps, read for claims.

NAME/report.json, NAME/runs.csv
    a study's report, as ``twofold study run`` writes it
NAME.json
    a list of rows, as ``benchmarks/NAME.py --json`` prints it
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd

from twofold.claims.claim import CountedEvidence, Evidence, RowEvidence, StudyEvidence, ValueEvidence
from twofold.claims.counted import counted
from twofold.claims.measured import Measured, Missing, Origin, exact, from_json
from twofold.claims.reports import Report
from twofold.errors import TwofoldError

REPORT = "report.json"


class Kept:
    """The results in ``folder``; where there is no such folder there are none. Every file is read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._files: dict[str, tuple[Any, str]] = {}
        self._runs: dict[str, pd.DataFrame] = {}

    @property
    def studies(self) -> tuple[str, ...]:
        """The studies whose reports are kept, by name."""
        return tuple(sorted(path.parent.name for path in self.folder.glob(f"*/{REPORT}")))

    def report(self, study: str) -> Report | None:
        """A study's report; None where none is kept. Raises TwofoldError for a file that is none."""
        values = self._read(f"{study}/{REPORT}")
        if values is None:
            return None
        if (
            not isinstance(values, dict)
            or not {"study", "sections", "status", "commands", "provenance"} <= values.keys()
        ):
            raise TwofoldError(
                f"{self.folder / study / REPORT} is not a study's report: make it again with `twofold study report`."
            )
        return Report(values=values, digest=self._files[f"{study}/{REPORT}"][1], runs=partial(self._table, study))

    def measure(self, evidence: Evidence) -> tuple[Measured, ...] | Missing:
        """What the results say. Raises TwofoldError for a file that cannot be read as what it should be."""
        if isinstance(evidence, StudyEvidence):
            return self._of_study(evidence)
        if isinstance(evidence, RowEvidence):
            return self._of_row(evidence)
        if isinstance(evidence, ValueEvidence):
            return self._of_value(evidence)
        return (_of_count(evidence),)

    def _of_study(self, evidence: StudyEvidence) -> tuple[Measured, ...] | Missing:
        report = self.report(evidence.study)
        if report is None:
            return Missing(reason=f"no result of the study {evidence.study} is kept")
        try:
            return report.measure(evidence)
        except (LookupError, TypeError) as error:
            place = self.folder / evidence.study / REPORT
            raise TwofoldError(f"{place} is not a report that this version reads ({error!r}): make it again.") from None

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
        return (self._once(evidence.row, float(row["value"]), row["unit"], evidence.command, name),)

    def _of_value(self, evidence: ValueEvidence) -> tuple[Measured, ...] | Missing:
        value = self._read(evidence.file)
        if value is None:
            return Missing(reason=f"{evidence.file} is not kept")
        whole, value = value, _at(value, evidence.at)
        if value is None:
            return Missing(reason=f"{evidence.file} has no {'.'.join(evidence.at)}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return (self._once(evidence.what, float(value), evidence.unit, evidence.command, evidence.file),)
        try:
            shown = from_json(value)
        except (LookupError, TypeError, ValueError):
            raise TwofoldError(
                f"{self.folder / evidence.file} holds neither a number nor a mean with its interval at {'.'.join(evidence.at)}: make it again."
            ) from None
        study, _, name = evidence.file.partition("/")
        report = self.report(study) if name == REPORT else None
        origin = report.origin() if report else self._origin(evidence.command, evidence.file)
        doubts = "; ".join(doubt.says for doubt in evidence.doubts if _at(whole, doubt.at) is True)
        measured = Measured(
            what=evidence.what, shown=shown, unit=evidence.unit, origin=origin, is_difference=evidence.is_difference
        )
        return (replace(measured, doubt=doubts),)

    def _once(self, what: str, value: float, unit: str, command: str, file: str) -> Measured:
        origin = self._origin(command, file)
        shown = exact(value, "measured once")
        return Measured(what=what, shown=shown, unit=unit, origin=origin, is_exact=True, is_difference=False)

    def _origin(self, command: str, file: str) -> Origin:
        return Origin(command=command, page=file, digest=self._files[file][1])

    # Files

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

    def _table(self, study: str) -> pd.DataFrame:
        """A study's runs.csv. Raises TwofoldError where it is not there or no such table."""
        if study not in self._runs:
            path = self.folder / study / "runs.csv"
            try:
                runs = pd.read_csv(path)
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise TwofoldError(f"{path} cannot be read ({reason}): make the report again.") from None
            if missing := {"task", "variant", "seed", "status"} - set(runs.columns):
                raise TwofoldError(f"{path} has no column {min(missing)}: make the report again.")
            self._runs[study] = runs
        return self._runs[study]


def _at(value: Any, keys: tuple[str, ...]) -> Any:
    """What a way of keys leads to; None where it leads nowhere."""
    for key in keys:
        value = _item(value, key)
    return value


def _item(value: Any, key: str) -> Any:
    """What a key leads to in an object or a list; None where it leads nowhere."""
    if isinstance(value, dict):
        return value.get(key)
    if not isinstance(value, list):
        return None
    if key.lstrip("-").isdigit():
        return value[int(key)] if -len(value) <= int(key) < len(value) else None
    named = (item for item in value if isinstance(item, dict) and key in (item.get("name"), item.get("variant")))
    return next(named, None)


def _of_count(evidence: CountedEvidence) -> Measured:
    what, value, unit = counted(evidence)
    origin = Origin(command=evidence.command)
    return Measured(what=what, shown=exact(value), unit=unit, origin=origin, is_exact=True, is_difference=False)
