"""How far a study is, for whoever draws it: counts, the runs under way, and an estimate of the time left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from twofold.cost import training_flops_per_token
from twofold.spec import ModelSpec
from twofold.study.record import Entry, TaskFacts
from twofold.training.progress import Progress
from twofold.training.spec import TrainingSpec

Phase = Literal["starting", "training", "finished"]

# What a step costs whatever its size, in operations: about 4 ms of a core that does 5e10 a second.
STEP_OVERHEAD_FLOPS = 2e8
FRESH_SHARE = 0.1
SMALLEST_SHARE = 0.005


@dataclass(frozen=True, kw_only=True)
class RunUnderWay:
    """A run that a worker is at work on, by the name of its folder; ``progress`` is None until it first reports."""

    path: str
    progress: Progress | None = None

    @property
    def share(self) -> float:
        """The part of the run's steps that is done."""
        return self.progress.step / self.progress.steps if self.progress else 0.0


@dataclass(frozen=True, kw_only=True)
class StudyProgress:
    """The study as it stands; ``total`` counts the runs that were asked for, ``done`` and ``failed`` those of them that ended.

    ``seconds_left`` is None until there is something to estimate it from.
    """

    phase: Phase
    done: int
    failed: int
    total: int
    under_way: tuple[RunUnderWay, ...]
    seconds_elapsed: float
    seconds_left: float | None


class Clock:
    """Estimates the time left from the operations that were done and those that remain.

    Only what was done since this runner began counts, so that resuming does not look fast.
    """

    def __init__(self, costs: Mapping[str, float]) -> None:
        self._costs = dict(costs)
        self._remaining = sum(costs.values())
        self._ended = 0.0
        self._shares_at_start: dict[str, float] = {}

    def began(self, run: RunUnderWay) -> None:
        """A run's first report: the part of it that an earlier runner did is not ours to count. A part too small for that is a fresh run's."""
        share = run.share if run.share > FRESH_SHARE else 0.0
        self._shares_at_start[run.path] = share
        self._remaining -= self._costs[run.path] * share

    def replace(self, expected: Iterable[str], costs: Mapping[str, float]) -> None:
        """What was counted in the name of ``expected`` turns out to be these."""
        self._remaining += sum(costs.values()) - sum(self._costs.pop(path) for path in expected)
        self._costs |= costs

    def ended(self, path: str) -> None:
        """A run has ended."""
        self._ended += self._costs[path] * (1 - self._shares_at_start.pop(path, 0.0))

    def seconds_left(self, under_way: Iterable[RunUnderWay], seconds: float) -> float | None:
        """From what was done in ``seconds``; None at the very beginning."""
        work = self._ended + sum(
            self._costs[run.path] * (run.share - self._shares_at_start[run.path])
            for run in under_way
            if run.path in self._shares_at_start
        )
        if work <= SMALLEST_SHARE * self._remaining and not self._ended:
            return None
        return max(0.0, self._remaining - work) * seconds / work if work else None


def cost(entry: Entry, facts: TaskFacts) -> float:
    """Operations of training an entry once, roughly: what orders runs and estimates times."""
    model, training = ModelSpec.from_dict(entry.run["model"]), TrainingSpec(**entry.run["training"])
    tokens = training.batch_size * facts.tokens_per_example
    return training.steps * (STEP_OVERHEAD_FLOPS + tokens * training_flops_per_token(model, facts.tokens_per_example))
