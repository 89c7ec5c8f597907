"""What a worker is given at a time: one run, or on a graphics processor as many alike runs as its memory holds, which train as one program. No torch."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twofold.study.provenance import usable_cores
from twofold.study.record import PlannedRun, TaskFacts
from twofold.training.alike import models_in, shape_of, why_alone


@dataclass(frozen=True, kw_only=True)
class Handouts:
    """How runs are handed out to so many ``workers``. ``asked`` is the most runs of a population; None: as many as fit the memory.

    ``memory_bytes`` is what is free on a worker's graphics processor, 0 where it has none: there, runs are trained together only if that is asked for.
    """

    asked: int | None
    workers: int
    facts: Mapping[str, TaskFacts]
    _shapes: dict[tuple[str, str], str] = field(default_factory=dict)

    def take(self, queue: deque[PlannedRun], memory_bytes: int) -> list[PlannedRun]:
        """The first of the queue, and of those behind it the ones that are alike: no more than fit, and than leave some for the other workers."""
        first = queue.popleft()
        limit = self._limit(first, memory_bytes)
        if limit == 1:
            return [first]
        alike = [planned for planned in queue if self._shape(planned) == self._shape(first)]
        share = -(-(len(alike) + 1) // self.workers)
        chosen = [first, *alike[: min(limit, share) - 1]]
        taken = {planned.path for planned in chosen}
        left = [planned for planned in queue if planned.path not in taken]
        queue.clear()
        queue.extend(left)
        return chosen

    def describe(self, runs: Iterable[PlannedRun], device: str, memory_bytes: int) -> str:
        """In words, for the record: ``populations of up to 40 on NVIDIA H100``, or ``one process per core``."""
        together = [(planned, limit) for planned in runs if (limit := self._limit(planned, memory_bytes)) > 1]
        counts = Counter(self._shape(planned) for planned, _ in together)
        largest = max((min(counts[self._shape(planned)], limit) for planned, limit in together), default=1)
        if largest > 1:
            return f"populations of up to {largest} on {device}"
        if memory_bytes:
            return "one run at a time on each graphics processor"
        return "one process per core" if self.workers == usable_cores() else "one run at a time in each process"

    def _limit(self, planned: PlannedRun, memory_bytes: int) -> int:
        if self.asked == 1 or not (self.asked or memory_bytes) or not self._shape(planned):
            return 1
        if not memory_bytes:
            return self.asked or 1
        fitting = models_in(memory_bytes, planned.run, self.facts[planned.entry.task].tokens_per_example)
        return min(self.asked or fitting, fitting)

    def _shape(self, planned: PlannedRun) -> str:
        """Of the entry's program; empty where its runs must be trained alone."""
        name = planned.entry.task, planned.entry.variant
        if name not in self._shapes:
            self._shapes[name] = "" if why_alone(planned.run) else shape_of(planned.run)
        return self._shapes[name]


def command_for(runs: Sequence[PlannedRun], study_folder: Path, *, keep_model: bool) -> dict[str, Any]:
    """What a worker is told (see :mod:`twofold.study.worker`)."""
    orders = [
        {
            "path": planned.path,
            "run": planned.run.to_dict(),
            "folder": str(planned.folder(study_folder)),
            "data_hash": planned.entry.data_hash,
        }
        for planned in runs
    ]
    if len(orders) == 1:
        return {"command": "run", **orders[0], "keep_model": keep_model}
    return {"command": "run-many", "runs": orders, "keep_model": keep_model}
