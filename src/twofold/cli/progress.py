"""Progress while one waits, on stderr and only where that is a terminal: a pipe or a log gets none of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import typer
from rich import progress as rich_progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn

from twofold import picture
from twofold.storage import read_json
from twofold.training.progress import Progress

if TYPE_CHECKING:
    from twofold.study.progress import StudyProgress


MOST_BARS = 32
"""More runs may be trained at a time than a screen has lines."""


class RunProgress:
    """The bar of one training run: ``with RunProgress("text") as bar: train(..., report=bar.report)``."""

    def __init__(self, name: str) -> None:
        self._progress = _bars()
        self._bar = self._progress.add_task(name, total=None, told="starting")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def report(self, now: Progress) -> None:
        """Move the bar. A line with the scores stays above it where the model has just been evaluated."""
        self._progress.update(self._bar, completed=now.step, total=now.steps, told=told(now))
        if now.scores and not self._progress.disable:
            self._progress.console.print(f"step {now.step:,}: {scores_text(now.scores)}", highlight=False)


@dataclass(frozen=True, kw_only=True)
class EndedRun:
    """A run of a study that has just ended: task/variant/seed, how, and its scores."""

    path: str
    status: str
    error: str
    scores: Mapping[str, float]

    def __str__(self) -> str:
        return f"{self.path}: {self.error if self.status == 'failed' else scores_text(self.scores)}"


class StudyProgressBars:
    """A bar for the study and one for each run under way; where nobody watches, a plain line for each run that ends.

    ``ended`` is called with each run that ends, in place of those lines.
    """

    def __init__(self, name: str, folder: Path, ended: Callable[[EndedRun], None] | None = None) -> None:
        self._folder = folder
        self._progress = _bars()
        self._study = self._progress.add_task(name, total=None, told="starting")
        self._runs: dict[str, TaskID] = {}
        self._ended = ended or self._print
        self.last: StudyProgress

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def report(self, now: StudyProgress) -> None:
        """Move the bars, and tell of the runs that have ended since the last report."""
        self.last = now
        shown = "reading the tasks' data" if now.phase == "starting" else _time_left(now.seconds_left)
        shown += f" · {now.failed} failed" if now.failed else ""
        self._progress.update(self._study, completed=now.done + now.failed, total=now.total or None, told=shown)
        under_way = {run.path: run for run in now.under_way}
        for path in [path for path in self._runs if path not in under_way]:
            self._progress.remove_task(self._runs.pop(path))
            self._ended(read_ended(self._folder, path))
        for path, run in under_way.items():
            if path not in self._runs:
                fits = len(self._runs) < MOST_BARS
                self._runs[path] = self._progress.add_task(f"  {path}", total=None, told="starting", visible=fits)
            if step := run.progress:
                self._progress.update(self._runs[path], completed=step.step, total=step.steps, told=told(step))

    def _print(self, run: EndedRun) -> None:
        if self._progress.disable:
            typer.echo(f"{run.status} {run}", err=True)
        elif run.status == "failed":
            self._progress.console.print(f"failed {run}", style="red", highlight=False, markup=False)


def read_ended(folder: Path, path: str) -> EndedRun:
    """How a run of a study ended, from its files."""
    status, outcome = (read_json(folder / "runs" / path / name) for name in ("status.json", "outcome.json"))
    return EndedRun(
        path=path,
        status=status.get("status", "failed"),
        error=status.get("error", ""),
        scores=outcome.get("scores", {}),
    )


def _bars() -> rich_progress.Progress:
    console = Console(stderr=True)
    return rich_progress.Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}", markup=False),
        console=console,
        disable=not console.is_terminal,
    )


def told(now: Progress) -> str:
    """``loss 1.234 · 12.3K tokens/s · 2 min left``."""
    parts = [
        f"loss {now.loss:.3f}",
        f"{picture.count_text(now.tokens_per_second)} tokens/s",
        f"{time_text(now.seconds_left)} left",
    ]
    return " · ".join(parts)


def scores_text(scores: Mapping[str, float]) -> str:
    """``accuracy 0.9812, loss 0.0613``."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in sorted(scores.items()))


def _time_left(seconds: float | None) -> str:
    return "time left unknown" if seconds is None or math.isnan(seconds) else f"{time_text(seconds)} left"


def time_text(seconds: float) -> str:
    """``0.8 s``, ``42 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = max(0, round(seconds))
    if whole < 10:
        return f"{max(0.0, seconds):.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
