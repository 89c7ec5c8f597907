"""A population: runs of one shape trained as one program, each of which leaves in its folder what it would have left alone.

First weights, the order of the data, the loss of every step, checkpoints and the outcome of a run are those of :func:`twofold.training.trainer.train`,
up to rounding; either way goes on from the other's checkpoints. A run that fails, by a loss that is not finite or a folder that cannot be written to,
fails alone. ``seconds`` of a run are its share of the population's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedModel

from twofold.errors import TwofoldError
from twofold.lock import FolderLock
from twofold.models import build_model
from twofold.storage import writing
from twofold.tasks import Task, load_task
from twofold.training.acceleration import accelerator_of
from twofold.training.alike import shape_of
from twofold.training.checkpoint import Checkpoints, TrainingState
from twofold.training.metrics import MetricsLog, Split
from twofold.training.optimizer import adamw
from twofold.training.order import DataOrder
from twofold.training.progress import Outcome, Progress
from twofold.training.run_folder import RunFolder
from twofold.training.schedule import learning_rate
from twofold.training.spec import RunSpec
from twofold.training.stacked import Machine, Stack
from twofold.training.standing import check_fit, fitting_checkpoint, is_due, outcome_of, tokens_at
from twofold.training.step import not_finite
from twofold.training.stopwatch import Stopwatch

Report = Callable[[Progress], None]
Ending = Outcome | TwofoldError

COMPILED_FROM_STEPS = 1000
"""Compiling takes up to a minute; fewer steps are sooner taken as they are."""

_log = logging.getLogger(__name__)


def train_population(
    runs: Sequence[RunSpec],
    folders: Sequence[Path],
    *,
    backend: str = "auto",
    report: Report | None = None,
    task: Task | None = None,
    compile_model: bool | None = None,
) -> list[Ending]:
    """Carry out runs of one shape (see :mod:`twofold.training.alike`) in their folders, or what is left of them: each one's outcome, or why it failed.

    The arguments are those of :func:`twofold.training.trainer.train`; "auto" is the folded kernel, and ``compile_model`` None compiles on a CUDA device
    where there are steps enough to make up for the time that compiling takes.
    ``report`` is told the progress of the mean run: its share of the time, and the mean loss of those that have not failed.

    Where the device's memory is not enough, each half is trained by itself. Raises TwofoldError for runs that are not of one shape or must be
    trained alone.
    """
    if len({shape_of(run) for run in runs}) > 1:
        raise TwofoldError(
            "These runs are not of one shape: a population shares task, model and steps, and differs in seeds, learning rates "
            "and the coefficients of ties with the same free projections."
        )
    if len(set(folders)) < len(folders):
        raise TwofoldError("Two runs of a population have one folder: give each its own.")
    if not runs:
        return []
    accelerator = accelerator_of(runs[0].training)
    if accelerator.num_processes > 1:
        raise TwofoldError(
            "A population is trained in one process: start it without accelerate launch, or train its runs alone."
        )
    device = accelerator.device
    pays = device.type == "cuda" and runs[0].training.steps >= COMPILED_FROM_STEPS
    compiles = pays if compile_model is None else compile_model
    machine = Machine(device, runs[0].training.precision, backend, compiles)
    task = load_task(runs[0].task) if task is None else task
    check_fit(runs[0].model, task)
    return _halved_where_memory_ends(list(zip(runs, folders, strict=True)), task, machine, report)


def _halved_where_memory_ends(
    chosen: Sequence[tuple[RunSpec, Path]], task: Task, machine: Machine, report: Report | None
) -> list[Ending]:
    try:
        with ExitStack() as held:
            return _Population(chosen, task, machine, held).train(report)
    except torch.OutOfMemoryError:
        pass  # and let go of the error, which holds on to what was in memory
    if len(chosen) == 1:
        return [
            TwofoldError(
                "One model is too much for the device's memory: use more accumulation_steps or a smaller batch_size."
            )
        ]
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()
    middle = len(chosen) // 2
    _log.warning(
        "%d models need more memory than there is: they are trained as %d and %d.",
        len(chosen),
        middle,
        len(chosen) - middle,
    )
    halves = (chosen[:middle], chosen[middle:])
    return [ending for half in halves for ending in _halved_where_memory_ends(half, task, machine, report)]


@dataclass(eq=False)
class _Member:
    """A run of a population: what :class:`twofold.training.trainer._Session` holds, but for the weights while they are in a stack."""

    run: RunSpec
    home: RunFolder
    ending: Ending | None = None
    step: int = 0
    seconds: float = 0.0
    scores: Mapping[str, float] = field(default_factory=dict)
    known: list[float] = field(default_factory=list)
    gradient_norm: float = math.nan
    model: PreTrainedModel = field(init=False)
    optimizer: torch.optim.AdamW = field(init=False)
    log: MetricsLog = field(init=False)
    held: ExitStack = field(default_factory=ExitStack)
    """The folder's lock and the log."""

    @contextmanager
    def failing_alone(self) -> Iterator[None]:
        """An error of this run's is its ending, and nobody else's."""
        try:
            yield
        except TwofoldError as error:
            self.fail(error)

    def fail(self, error: TwofoldError) -> None:
        """Leave the folder as it is."""
        self.ending = error
        self.held.__exit__(type(error), error, error.__traceback__)

    def begin(self, task: Task) -> None:
        """Take the folder, and make the model as it was left there."""
        self.home.check(self.run)
        if (outcome := self.home.outcome()) is not None:
            self.ending = outcome
            return
        self.held.enter_context(FolderLock(self.home.path))
        self.home.begin(self.run)
        self.model = build_model(self.run.model, seed=self.run.seed)
        self.optimizer = adamw(self.model, self.run.training)
        if (checkpoint := fitting_checkpoint(self.run, self.home, task)) is not None:
            checkpoint.restore(self.model, self.optimizer)
            state = checkpoint.state
            self.step, self.seconds, self.scores, self.known = (
                state.step,
                state.seconds,
                state.scores,
                list(state.losses),
            )
        with writing(self.home.path):
            Checkpoints(self.home.path).clean(self.step)
        self.log = self.held.enter_context(MetricsLog(self.home.path, step=self.step, tensorboard=False))

    @property
    def loss(self) -> float:
        """Mean loss of the steps since the last line of the log."""
        return math.fsum(self.known) / len(self.known) if self.known else math.nan

    def note(self, order: DataOrder, step: int, loss: float, norm: float) -> None:
        """Take down a step's loss; one that is not finite is this run's end."""
        if self.ending is not None:
            return
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.fail(not_finite(order, step, loss, norm))
            return
        self.known.append(loss)
        self.gradient_norm = norm

    def take_back(self, kinds: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put weights and AdamW's state where files are written from."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(kinds["weights"][name])
                self.optimizer.state[parameter] = {kind: kinds[kind][name] for kind in kinds if kind != "weights"}

    def write(self, task: Task, split: Split, values: Mapping[str, float], seconds: float) -> None:
        """A line of metrics.jsonl."""
        tokens = tokens_at(self.run, task, self.step)
        self.log.write(step=self.step, tokens=tokens, seconds=seconds, split=split, values=values)

    def save(self, task: Task, seconds: float) -> None:
        """A checkpoint of the weights that were taken back."""
        self.log.sync()
        state = TrainingState(
            step=self.step,
            seconds=seconds,
            losses=tuple(self.known),
            scores=self.scores,
            fingerprint=self.run.fingerprint,
            data_hash=task.data_hash,
        )
        Checkpoints(self.home.path).save(state, self.model, self.optimizer)


class _Population:
    """The members, and the order in which those that stand at different steps are brought to the end."""

    def __init__(self, chosen: Sequence[tuple[RunSpec, Path]], task: Task, machine: Machine, held: ExitStack) -> None:
        self.task, self.machine = task, machine
        self.members = [_Member(run, RunFolder(Path(folder))) for run, folder in chosen]
        for member in self.members:
            held.enter_context(member.held)
            with member.failing_alone():
                member.begin(task)

    def train(self, report: Report | None) -> list[Ending]:
        """Those that are behind (a kill in the middle of saving leaves some a checkpoint behind) catch up, and are joined by the others."""
        steps = self.members[0].run.training.steps
        while left := [member for member in self.members if member.ending is None]:
            behind = min(member.step for member in left)
            cohort = [member for member in left if member.step == behind]
            until = min((member.step for member in left if member.step > behind), default=steps)
            _Cohort(cohort, self.task, self.machine, report).advance(until)
        return [member.ending for member in self.members if member.ending is not None]


class _Cohort:
    """Members that stand at one step, as a stack. All have the same cadence: what is due for one is due for all."""

    def __init__(self, members: list[_Member], task: Task, machine: Machine, report: Report | None) -> None:
        self.members, self.task, self.report = members, task, report
        self.stack = Stack([member.run for member in members], [member.model for member in members], task, machine)
        self.stack.load([member.model for member in members], [member.optimizer for member in members])
        self.step = self._first_step = members[0].step
        self._pending: list[tuple[int, Tensor, Tensor]] = []
        self._watch = Stopwatch()
        self._begun = perf_counter()
        self._reported = (self.step, 0.0)

    @property
    def alive(self) -> list[_Member]:
        """Those that have not failed."""
        return [member for member in self.members if member.ending is None]

    def advance(self, until: int) -> None:
        """Take the steps up to ``until``, and write how the runs ended if those were the last."""
        while self.step < until and self.alive:
            self._advance()
        self._settle()
        self._take_back()
        for member in self.members:
            member.seconds = self._seconds(member)
        steps = self.members[0].run.training.steps
        if until < steps or not self.alive:
            return
        if not all(member.scores for member in self.alive):
            self._evaluate()
        for member in self.alive:
            with member.failing_alone():
                order = self.stack.order(self.members.index(member))
                outcome = outcome_of(member.run, self.task, order, scores=member.scores, seconds=member.seconds)
                member.home.end(member.model, outcome)
                member.held.close()
                member.ending = outcome

    def _advance(self) -> None:
        run = self.members[0].run
        spec = run.training
        self.step += 1
        self._pending.append((self.step, *self.stack.take(self.step)))
        logs, evaluates, saves = (
            is_due(run, self.step, every) for every in (spec.log_every, spec.evaluate_every, spec.checkpoint_every)
        )
        if not (logs or evaluates or saves):
            return
        self._settle()
        loss = _mean([member.loss for member in self.alive])
        for member in self.alive:
            member.step, member.scores = self.step, {}
        if logs:
            self._log_losses()
        with self._watch.paused():
            if evaluates:
                self._evaluate()
                self._write("held_out", lambda member: member.scores)
            if saves:
                self._take_back()
                for member in self.alive:
                    with member.failing_alone():
                        member.save(self.task, self._seconds(member))
            if self.report is not None and self.alive and (logs or evaluates):
                self.report(self._progress(loss))

    def _settle(self) -> None:
        """Look at the steps since the last time: that waits for the device."""
        if self._pending:
            # As LossLedger does: norms in the dtype of the losses.
            looked = torch.stack([torch.stack((losses, norms.to(losses.dtype))) for _, losses, norms in self._pending])
            for (step, _, _), (losses, norms) in zip(self._pending, looked.tolist(), strict=True):
                for index, (member, loss, norm) in enumerate(zip(self.members, losses, norms, strict=True)):
                    member.note(self.stack.order(index), step, loss, norm)
            self._pending.clear()
        for member in self.alive:
            member.step = self.step

    def _log_losses(self) -> None:
        def values(member: _Member) -> Mapping[str, float]:
            rate = learning_rate(member.run.training, self.step)
            return {"loss": member.loss, "learning_rate": rate, "gradient_norm": member.gradient_norm}

        self._write("train", values)
        for member in self.alive:
            member.known.clear()

    def _write(self, split: Split, values: Callable[[_Member], Mapping[str, float]]) -> None:
        for member in self.alive:
            with member.failing_alone():
                member.write(self.task, split, values(member), self._seconds(member))

    def _evaluate(self) -> None:
        spec = self.members[0].run.training
        found = self.stack.evaluate(spec.batch_size // spec.accumulation_steps)
        for member, scores in zip(self.members, found, strict=True):
            member.scores = scores

    def _take_back(self) -> None:
        for member, kinds in zip(self.members, self.stack.unload(self.step), strict=True):
            member.take_back(kinds)

    def _seconds(self, member: _Member) -> float:
        """A member's own, and its share of the cohort's."""
        return member.seconds + self._watch.seconds / len(self.members)

    def _progress(self, loss: float) -> Progress:
        run, models = self.members[0].run, len(self.members)
        (step, seconds), self._reported = self._reported, (self.step, self._watch.seconds)
        spent, tokens = self._reported[1] - seconds, tokens_at(run, self.task, self.step - step)
        pace = (perf_counter() - self._begun) / (self.step - self._first_step)
        return Progress(
            step=self.step,
            steps=run.training.steps,
            tokens=tokens_at(run, self.task, self.step),
            loss=loss,
            seconds=self._watch.seconds / models,
            tokens_per_second=tokens / spent if spent > 0 else 0.0,
            seconds_left=pace * (run.training.steps - self.step),
        )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
