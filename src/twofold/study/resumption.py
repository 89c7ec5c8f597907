"""Beginning a study or going on with one: results of different plans, or of different code, are never mixed.

A folder's study.json says with which plan and which code its runs were made. Where either differs, a runner refuses and says what differs; who
knows that it does not matter may accept it, and study.json then tells every reader so. A run of another configuration is refused always.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from twofold.errors import TwofoldError
from twofold.storage import read_json
from twofold.study.plan import StudyPlan
from twofold.study.provenance import code_hash, describe, library_versions, now
from twofold.study.record import FILE_NAME, PlannedRun, StudyRecord

ACCEPT = "--accept-changes"
SHOWN_VALUE = 60


def earlier(plan: StudyPlan, folder: Path, *, accept_changes: bool) -> StudyRecord | None:
    """The folder's record where it can be gone on with as it is; None where the plan has to be expanded (again).

    Raises TwofoldError where the folder's runs came from another plan or other code, unless that is accepted.
    """
    if not (folder / FILE_NAME).exists():
        return None
    record = StudyRecord.read(folder)
    differences = []
    if record.plan.plan_hash != plan.plan_hash:
        differences.append(f"another plan ({plan_difference(record.plan, plan)})")
    if record.code_hash != code_hash():
        differences.append(f"other code ({code_difference(record)})")
    if differences and not accept_changes:
        raise TwofoldError(
            f"{folder} holds results of {' and '.join(differences)}: choose another folder with --folder, "
            f"or go on in this one with {ACCEPT}, which its report will then say."
        )
    return record if record.plan.plan_hash == plan.plan_hash else None


def begun(record: StudyRecord, folder: Path, invocation: dict[str, Any]) -> StudyRecord:
    """``record``, freshly expanded or read, as it is to be written: what earlier runners left, and this one's ``invocation``, noted."""
    old = StudyRecord.read(folder) if (folder / FILE_NAME).exists() else None
    provenance = dict(old.provenance if old else describe(invocation["command"]))
    if old and old.code_hash != code_hash():
        change = {"at": now(), "from": old.code_hash, "to": code_hash(), "what": code_difference(old)}
        provenance["code_changes"] = [*provenance.get("code_changes", ()), change]
    if old and old.plan.plan_hash != record.plan.plan_hash:
        what = plan_difference(old.plan, record.plan)
        change = {"at": now(), "from": old.plan.plan_hash, "to": record.plan.plan_hash, "what": what}
        provenance["plan_changes"] = [*provenance.get("plan_changes", ()), change]
    hardware = provenance.get("hardware", {})
    devices = {*hardware.get("gpus", ()), invocation["device"]} - {"", "cpu"}
    provenance["hardware"] = {**hardware, "gpus": sorted(devices)}
    provenance["invocations"] = [*provenance.get("invocations", ()), {"at": now(), **invocation}]
    return replace(record, code_hash=code_hash(), provenance=provenance)


def joined(old: StudyRecord | None, new: StudyRecord) -> StudyRecord:
    """``new``, with what ``old``, a record of the same plan, has said of a task already: its runs were made with those data."""
    if old is None:
        return new
    tasks = {**new.tasks, **old.tasks}
    entries = [entry for entry in new.entries if entry.task not in old.tasks] + list(old.entries)
    order = {task.name: place for place, task in enumerate(new.plan.planned_tasks)}
    return replace(
        new,
        tasks={name: tasks[name] for name in sorted(tasks, key=order.__getitem__)},
        entries=tuple(sorted(entries, key=lambda entry: order[entry.task])),
    )


def refuse_other_runs(runs: Iterable[PlannedRun], folder: Path) -> None:
    """Raise TwofoldError where a run's folder holds a run of another configuration."""
    for planned in runs:
        stored = read_json(planned.folder(folder) / "run.json")
        wanted = {**planned.entry.run, "seed": planned.seed + planned.entry.seed_shift}
        changed = [name for name, value in wanted.items() if stored and stored.get(name) != value]
        if changed:
            raise TwofoldError(
                f"{planned.folder(folder)} holds a run whose {' and '.join(changed)} differ from the plan's: "
                "choose another folder for the study, or delete that one."
            )


def plan_difference(old: StudyPlan, new: StudyPlan) -> str:
    """The first field in which two plans differ, as "seeds: [0, 1] is now [0, 1, 2]"; items are named where they have names."""
    return _difference(old.to_dict(), new.to_dict(), "") or "in the order of its fields"


def _difference(old: Any, new: Any, place: str) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            if found := _difference(old.get(name), new.get(name), f"{place}.{name}" if place else str(name)):
                return found
        return ""
    if _named(old) and _named(new):
        return _difference({v["name"]: v for v in old}, {v["name"]: v for v in new}, place)
    return "" if old == new else f"{place}: {_short(old)} is now {_short(new)}"


def _named(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(v, dict) and "name" in v for v in values)


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= SHOWN_VALUE else text[: SHOWN_VALUE - 1] + "…"


def code_difference(record: StudyRecord) -> str:
    """How the code that runs now differs from a record's: the libraries that changed, or Twofold itself."""
    was = record.provenance
    changes = [
        f"{name} {was.get(name)} is now {is_now}"
        for name, is_now in library_versions().items()
        if was.get(name) != is_now
    ]
    return ", ".join(changes) or f"Twofold's sources changed since {was.get('git_commit') or was.get('started_at')}"
