"""Runs a study: its runs on all cores, resumed after a kill, past failures, with nothing run twice.

The runner itself computes nothing and needs no torch. It holds the folder's lock, hands runs to worker processes, and writes each run's
status.json; a run that is done is only read, one that was under way goes on from its checkpoint, and one that failed is tried again
when the study is run again.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from twofold.errors import TwofoldError
from twofold.lock import FolderLock
from twofold.storage import read_json, write_json
from twofold.study.handouts import Handouts, command_for
from twofold.study.plan import StudyPlan
from twofold.study.pool import Answer, Pool, Worker
from twofold.study.progress import Clock, Phase, RunUnderWay, StudyProgress, cost
from twofold.study.provenance import graphics_processors, usable_cores
from twofold.study.record import PlannedRun, StudyRecord, TaskFacts, entry_from_dict
from twofold.study.results import Results
from twofold.study.resumption import begun, earlier, joined, refuse_other_runs
from twofold.study.selection import Selection
from twofold.study.tuning import Tournament, is_done, runs
from twofold.training.progress import Progress

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_CHANGES = 20.0
# Telling of changes (writing a report) may take at most this part of the time.
SHARE_OF_CHANGES = 0.05

Observe = Callable[[StudyProgress], None]


def run_study(
    plan: StudyPlan,
    folder: Path,
    *,
    command: str,
    workers: int | None = None,
    population: int | None = None,
    only: Sequence[str] = (),
    accept_changes: bool = False,
    observe: Observe | None = None,
    on_change: Callable[[], None] | None = None,
) -> Results:
    """Run what is not yet done of ``plan`` in ``folder`` and read the results.

    ``command`` is how this was asked for, to be shown beside the numbers. ``workers`` is the number of processes (None: one for each graphics
    processor, or else for each core). ``population`` is the most runs that a worker trains as one program (None: as many as the memory of its
    graphics processor holds, and one on a CPU). ``only`` names a subset (see :class:`~twofold.study.selection.Selection`).
    ``accept_changes`` goes on in a folder whose results came from another plan or other code, and records that.

    ``observe`` hears of progress often, in the caller's thread. ``on_change`` rewrites what is shown of the folder: it is called at the start,
    after the first run, then every 20 s or more seldom where it takes long, and at the end; never twice at once, and in a thread of
    its own, so that no worker waits for it. An error in either ends the study, which can be resumed.

    Raises TwofoldError where the plan cannot be expanded, the folder holds other results, or another runner is at work in it.
    """
    for asked, what in ((workers, "worker"), (population, "run in a population")):
        if asked is not None and asked < 1:
            raise TwofoldError(f"A study needs at least one {what}, not {asked}.")
    selection = Selection(plan, only)
    with FolderLock(folder):
        record = earlier(plan, folder, accept_changes=accept_changes)
        needed = [task.name for task in plan.planned_tasks if selection.wants(task)]
        is_whole = record is not None and record.tasks.keys() >= set(needed)
        with _Changes(on_change) as changes, Pool(folder / "logs") as pool:
            runner = _Runner(folder, selection, pool, changes, observe)
            runner.start_workers(workers, enough=runner.count_open_runs(record) if record and is_whole else None)
            if record is None or not is_whole:
                record = joined(record, runner.expand(plan, needed))
            way = runner.way(record, population)
            invocation = {
                "command": command,
                "only": list(only),
                "workers": len(pool.workers),
                "device": runner.device,
                "way": way,
            }
            runner.train(begun(record, folder, invocation))
    return Results.load(folder)


class _Runner:
    """The loop between the pool's answers and the folder."""

    def __init__(
        self, folder: Path, selection: Selection, pool: Pool, changes: _Changes, observe: Observe | None
    ) -> None:
        self._folder = folder
        self._selection = selection
        self._pool = pool
        self._changes = changes
        self._observe = observe
        self._began = time.monotonic()
        self._phase: Phase = "starting"
        self.device = ""
        self._ready: set[Worker] = set()
        self._idle: list[Worker] = []
        self._queue: deque[PlannedRun] = deque()
        self._current: dict[Worker, dict[str, tuple[PlannedRun, RunUnderWay]]] = {}
        self._handouts = Handouts(asked=1, workers=1, facts={})
        self._clock = Clock({})
        self._training_began = 0.0
        self._entry_costs: dict[int, float] = {}
        self._tournament: Tournament | None = None
        self._keep_models = True
        self._an_end_was_noted = False
        self._done = self._failed = self._total = 0

    # Before training

    def start_workers(self, asked: int | None, *, enough: int | None) -> None:
        """Start them all, no more than there are runs where that is known (``enough``), and wait for the first."""
        devices = graphics_processors()
        self._start(asked or devices or usable_cores(), devices, enough)
        while self._pool.workers and not self._ready:
            self._next_answer()
        if devices and self.device == "cpu" and asked is None:
            # There are graphics processors, but not for this torch: use all cores, as on a machine without.
            self._start(usable_cores() - devices, 0, enough)

    def _start(self, count: int, devices: int, enough: int | None) -> None:
        count = count if enough is None else min(count, enough - len(self._pool.workers))
        for number in range(count):
            self._pool.start(number % devices if devices else None)

    def count_open_runs(self, record: StudyRecord) -> int:
        """How many selected runs have not been done. Raises TwofoldError where one's folder holds another run."""
        tournament = self._tournament_of(record)
        return len(self._open(tournament.known)) + len(tournament.expected)

    def _tournament_of(self, record: StudyRecord) -> Tournament:
        tournament = Tournament(record, self._folder, self._selection.holds)
        refuse_other_runs([*tournament.known, *tournament.candidates], self._folder)
        if record.plan.is_tuned and not tournament.known and not tournament.expected:
            choosing = " ".join(f"--only seed-{seed}" for seed in record.plan.choosing_seeds)
            raise TwofoldError(
                f"Nothing of this can be run yet: other seeds are run at the chosen point of a tuned axis, so run those that choose first ({choosing})."
            )
        return tournament

    def _open(self, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
        return [planned for planned in runs if not is_done(planned.folder(self._folder))]

    def expand(self, plan: StudyPlan, needed: Sequence[str]) -> StudyRecord:
        """Have a worker ask the tasks what they dictate, and check every model of the plan; tasks that are not ``needed`` may lack their data."""
        asked = self._idle[0]
        asked.send({"command": "expand", "plan": plan.to_dict(), "needed": list(needed)})
        while (answer := self._next_answer()) is None or answer.worker is not asked:
            pass
        if answer.event == "refused":
            raise TwofoldError(answer.values["error"])
        tasks = {name: TaskFacts(**facts) for name, facts in answer.values["tasks"].items()}
        entries = tuple(entry_from_dict(entry) for entry in answer.values["entries"])
        return StudyRecord(plan=plan, code_hash="", provenance={}, tasks=tasks, entries=entries)

    def way(self, record: StudyRecord, population: int | None) -> str:
        """Settle how runs are handed out, and say it in words."""
        self._handouts = Handouts(asked=population, workers=max(1, len(self._pool.workers)), facts=record.tasks)
        memory = max((worker.memory_bytes for worker in self._pool.workers), default=0)
        return self._handouts.describe(self._open(self._tournament_of(record).known), self.device, memory)

    # Training

    def train(self, record: StudyRecord) -> None:
        """Train what is open; returns when all of it has ended."""
        self._tournament = tournament = self._tournament_of(record)
        remaining, expected = self._open(tournament.known), tournament.expected
        record.write(self._folder)
        self._total = len(tournament.known) + len(expected)
        self._done = len(tournament.known) - len(remaining)
        self._entry_costs = {id(entry): cost(entry, record.tasks[entry.task]) for entry in record.entries}
        self._queue = deque(_in_order(remaining, self._costs(remaining)))
        self._clock = Clock(self._costs([*remaining, *expected]))
        self._training_began, self._phase = time.monotonic(), "training"
        self._keep_models = record.plan.keep_models
        self._settle(record)
        self._changes.note()
        self._hand_out()
        while self._queue or self._current:
            answer = self._next_answer()
            if answer is not None:
                self._heed(answer)
        self._phase = "finished"
        self._tell()

    def _costs(self, runs: Sequence[PlannedRun]) -> dict[str, float]:
        return {planned.path: self._entry_costs[id(planned.entry)] for planned in runs}

    def _settle(self, record: StudyRecord) -> None:
        """A runner that was killed may have left a run that is done without saying so."""
        for planned in runs(record, self._folder):
            folder = planned.folder(self._folder)
            if is_done(folder) and read_json(folder / "status.json").get("status") != "done":
                write_json(folder / "status.json", {"status": "done", "error": ""})

    def _heed(self, answer: Answer) -> None:
        worker = answer.worker
        if answer.event == "progress":
            told = {name: value for name, value in answer.values.items() if name != "event"}
            for path, (planned, before) in self._current[worker].items():
                run = RunUnderWay(path=path, progress=Progress(**told))
                self._current[worker][path] = planned, run
                if before.progress is None:
                    self._clock.began(run)
        elif answer.event == "ended":
            planned, _ = self._current[worker].pop(answer.values["path"])
            self._end(planned, answer.values["status"], answer.values["error"])
        elif answer.event in {"done", "failed"}:
            self._end_all(worker, answer.event, answer.values.get("error", ""))
            self._idle.append(worker)
            self._hand_out()
        elif answer.event == "exited":
            self._replace(answer)

    def _replace(self, answer: Answer) -> None:
        """A worker has died: its run has failed, and another takes its place while there is work."""
        worker = answer.worker
        self._end_all(worker, "failed", _killed(answer))
        if worker in self._idle:
            self._idle.remove(worker)
        self._hand_out()
        if self._queue:
            self._pool.replace(worker)

    def _hand_out(self) -> None:
        while self._idle and self._queue:
            worker = self._idle.pop(0)
            chosen = self._handouts.take(self._queue, worker.memory_bytes)
            for planned in chosen:
                folder = planned.folder(self._folder)
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / "status.json", {"status": "running", "error": ""})
            self._current[worker] = {planned.path: (planned, RunUnderWay(path=planned.path)) for planned in chosen}
            worker.send(command_for(chosen, self._folder, keep_model=self._keep_models))

    def _end_all(self, worker: Worker, status: str, error: str) -> None:
        """All that the worker has not said of how it ended: its only run, or those of many that it died over."""
        for planned, _ in self._current.pop(worker, {}).values():
            self._end(planned, status, error)

    def _end(self, planned: PlannedRun, status: str, error: str) -> None:
        write_json(planned.folder(self._folder) / "status.json", {"status": status, "error": error})
        self._clock.ended(planned.path)
        self._done += status == "done"
        self._failed += status == "failed"
        if self._tournament and (decided := self._tournament.ended(planned)):
            expected, chosen = decided
            new = self._open(chosen)
            self._total += len(chosen) - len(expected)
            self._done += len(chosen) - len(new)
            self._clock.replace([run.path for run in expected], self._costs(new))
            self._queue.extend(new)
        if not self._an_end_was_noted:
            self._an_end_was_noted = True
            self._changes.note()

    # Listening and telling

    def _next_answer(self) -> Answer | None:
        """The next answer, or None after a while. Raises TwofoldError where a worker cannot even begin."""
        answer = self._pool.next_answer(SECONDS_BETWEEN_LOOKS)
        if answer is not None and answer.event == "ready":
            self.device = answer.values["device"]
            answer.worker.memory_bytes = answer.values.get("memory_bytes", 0)
            self._ready.add(answer.worker)
            self._idle.append(answer.worker)
            self._hand_out()
        if answer is not None and answer.event == "exited" and not self._can_be_replaced(answer.worker):
            raise TwofoldError(_cannot_work(answer))
        self._changes.look()
        self._tell()
        return answer

    def _can_be_replaced(self, worker: Worker) -> bool:
        """One that never got ready would die again and again."""
        return worker in self._ready and self._phase == "training"

    def _tell(self) -> None:
        if self._observe is None:
            return
        under_way = tuple(run for current in self._current.values() for _, run in current.values())
        now = time.monotonic()
        left = self._clock.seconds_left(under_way, now - self._training_began) if self._phase == "training" else None
        self._observe(
            StudyProgress(
                phase=self._phase,
                done=self._done,
                failed=self._failed,
                total=self._total,
                under_way=under_way,
                seconds_elapsed=now - self._began,
                seconds_left=0.0 if self._phase == "finished" else left,
            )
        )


class _Changes:
    """Calls ``on_change`` in a thread of its own, not too often, and once more at the end."""

    def __init__(self, on_change: Callable[[], None] | None) -> None:
        self._on_change = on_change
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._call: Future[float] | None = None
        self._is_due = False
        self._next = math.inf

    def __enter__(self) -> _Changes:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._thread.shutdown(wait=True)
        if kind is None and self._on_change is not None:
            if self._call is not None:
                self._call.result()
            self._on_change()

    def note(self) -> None:
        """The folder has changed in a way that should be seen soon."""
        self._is_due = True

    def look(self) -> None:
        """Call if it is time; raises the error of an earlier call."""
        if self._call is not None and self._call.done():
            pause = max(SECONDS_BETWEEN_CHANGES, self._call.result() / SHARE_OF_CHANGES)
            self._call, self._next = None, time.monotonic() + pause
        if self._on_change is not None and self._call is None and (self._is_due or time.monotonic() >= self._next):
            self._is_due = False
            self._call = self._thread.submit(_timed, self._on_change)


def _timed(call: Callable[[], None]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def _in_order(runs: list[PlannedRun], costs: dict[str, float]) -> list[PlannedRun]:
    """Seed by seed, so that early results compare all variants; the last seed's longest first, so that all workers end together."""
    if not runs:
        return []
    last = runs[-1].seed
    tail = [planned for planned in runs if planned.seed == last]
    return [planned for planned in runs if planned.seed != last] + sorted(
        tail, key=lambda planned: -costs[planned.path]
    )


def _cannot_work(answer: Answer) -> str:
    words = answer.worker.last_words()
    return f"A worker process ended with code {answer.values['code']} before it could work; its log, {answer.worker.log}, ends: {words or 'nothing'}"


def _killed(answer: Answer) -> str:
    code = answer.values["code"]
    how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
    hint = " (9 is often the system's answer to too little memory)" if code == -9 else ""
    return f"The process that trained this run {how}{hint}; its log is logs/{answer.worker.log.name}."
