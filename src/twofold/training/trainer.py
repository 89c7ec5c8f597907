"""The trainer: a run, a folder, and a process that may be killed at any moment.

A run is a function of its RunSpec. What it has reached lies in the folder (see run_folder), and a call with the same run goes on from there:
on a CPU, with as many threads, to bitwise the same weights as without the interruption.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from accelerate import Accelerator

from twofold.lock import FolderLock
from twofold.models import build_model
from twofold.storage import writing
from twofold.tasks import Task, load_task
from twofold.training.acceleration import accelerator_of
from twofold.training.checkpoint import Checkpoints, TrainingState
from twofold.training.evaluation import evaluate
from twofold.training.metrics import MetricsLog, Split
from twofold.training.progress import Outcome, Progress
from twofold.training.random_state import isolated_random_state
from twofold.training.run_folder import RunFolder
from twofold.training.schedule import learning_rate
from twofold.training.spec import RunSpec
from twofold.training.standing import check_fit, fitting_checkpoint, is_due, outcome_of, tokens_at
from twofold.training.step import LossLedger, Stepper
from twofold.training.stopwatch import Stopwatch

__all__ = ["Outcome", "Progress", "Report", "train"]

Report = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True)
class _Machine:
    """How a run is carried out; its outcome does not depend on it but for rounding."""

    accelerator: Accelerator
    backend: str
    tensorboard: bool
    compile_model: bool


def train(
    run: RunSpec,
    folder: Path,
    *,
    backend: str = "auto",
    report: Report | None = None,
    task: Task | None = None,
    tensorboard: bool = False,
    compile_model: bool = False,
) -> Outcome:
    """Carry out ``run`` in ``folder``, or what is left of it; a run that has ended there is not repeated, its outcome is given.

    ``backend`` is the attention kernel (see :mod:`twofold.kernels`). ``report`` is told the progress every ``log_every`` steps and after each
    evaluation, in the first process only. ``task`` is ``run.task`` where it is loaded already. ``tensorboard`` writes the metrics for
    TensorBoard too. ``compile_model`` compiles the model and its loss with torch.compile. The caller's random state is left as it was.

    Raises TwofoldError if the folder holds another run, is being trained in or cannot be written to, if the data changed since the run began, and if a
    loss or a gradient is not finite. The last checkpoint stays what it was in each case, and under Ctrl-C.
    """
    home = RunFolder(Path(folder))
    home.check(run)
    if (outcome := home.outcome()) is not None:
        return outcome
    accelerator = accelerator_of(run.training)
    task = load_task(run.task) if task is None else task
    check_fit(run.model, task)
    machine = _Machine(accelerator=accelerator, backend=backend, tensorboard=tensorboard, compile_model=compile_model)
    with FolderLock(home.path) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            home.begin(run)
        accelerator.wait_for_everyone()
        with isolated_random_state(accelerator.device):
            return _Session(run, home, task, machine, report).finish()


class _Session:
    """The part of a run that one call of :func:`train` carries out."""

    def __init__(self, run: RunSpec, home: RunFolder, task: Task, machine: _Machine, report: Report | None) -> None:
        self.run, self.home, self.task, self.accelerator = run, home, task, machine.accelerator
        self.report = report if machine.accelerator.is_main_process else None
        self.model = build_model(run.model, seed=run.seed, backend=machine.backend)
        self.stepper = Stepper(run, self.model, task, machine.accelerator, compile_model=machine.compile_model)
        self.checkpoints = Checkpoints(home.path)
        state = self._restored()
        self.step = state.step
        self.scores: Mapping[str, float] = state.scores
        self.ledger = LossLedger(self.stepper, known=list(state.losses))
        self.loss = self.ledger.mean
        self.log = self._opened_log(machine.tensorboard)
        self.watch = Stopwatch(state.seconds)
        self._begun = perf_counter()
        self._first_step = state.step
        self._reported = (self.tokens, state.seconds)

    def _restored(self) -> TrainingState:
        """Where the run stands, its tensors put in place."""
        checkpoint = fitting_checkpoint(self.run, self.home, self.task)
        if checkpoint is None:
            return TrainingState()
        state = checkpoint.state
        checkpoint.restore(self.model, self.stepper.optimizer)
        if state.scaler and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(dict(state.scaler))
        return state

    def _opened_log(self, tensorboard: bool) -> AbstractContextManager[MetricsLog | None]:
        if not self.accelerator.is_main_process:
            return nullcontext()
        with writing(self.home.path):
            self.checkpoints.clean(self.step)
        return MetricsLog(self.home.path, step=self.step, tensorboard=tensorboard)

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return tokens_at(self.run, self.task, self.step)

    def finish(self) -> Outcome:
        """Take the steps that are left, and write how the run ended."""
        with self.log as log:
            while self.step < self.run.training.steps:
                self._advance(log)
        scores = self.scores or self._evaluated()
        order, seconds = self.stepper.order, self.watch.seconds
        outcome = outcome_of(self.run, self.task, order, scores=scores, seconds=seconds)
        if self.accelerator.is_main_process:
            self.home.end(self.model, outcome)
        self.accelerator.wait_for_everyone()
        return outcome

    def _advance(self, log: MetricsLog | None) -> None:
        spec = self.run.training
        self.step += 1
        self.ledger.add(self.step, *self.stepper.take(self.step))
        logs, evaluates, saves = map(self._is_due, (spec.log_every, spec.evaluate_every, spec.checkpoint_every))
        if not (logs or evaluates or saves):
            return
        # Before anything is written: a checkpoint of weights that are not finite would end the run for good.
        self.ledger.settle()
        self.loss, self.scores = self.ledger.mean, {}
        if logs:
            rate = learning_rate(spec, self.step)
            values = {"loss": self.loss, "learning_rate": rate, "gradient_norm": self.ledger.gradient_norm}
            self._write(log, "train", values)
            self.ledger.known.clear()
        with self.watch.paused():
            if evaluates:
                self.scores = self._evaluated()
                self._write(log, "held_out", self.scores)
            if saves:
                self._save(log)
            if self.report is not None and (logs or evaluates):
                self.report(self._progress())

    def _is_due(self, every: int) -> bool:
        return is_due(self.run, self.step, every)

    def _evaluated(self) -> dict[str, float]:
        part = self.run.training.batch_size // self.run.training.accumulation_steps
        return evaluate(self.model, self.task, batch_size=part, accelerator=self.accelerator)

    def _write(self, log: MetricsLog | None, split: Split, values: Mapping[str, float]) -> None:
        if log is not None:
            log.write(step=self.step, tokens=self.tokens, seconds=self.watch.seconds, split=split, values=values)

    def _save(self, log: MetricsLog | None) -> None:
        if log is not None:
            log.sync()
            scaler = self.accelerator.scaler
            state = TrainingState(
                step=self.step,
                seconds=self.watch.seconds,
                losses=tuple(self.ledger.known),
                scores=self.scores,
                scaler={} if scaler is None else scaler.state_dict(),
                fingerprint=self.run.fingerprint,
                data_hash=self.task.data_hash,
            )
            self.checkpoints.save(state, self.model, self.stepper.optimizer)
        self.accelerator.wait_for_everyone()

    def _progress(self) -> Progress:
        spec = self.run.training
        (tokens, seconds), self._reported = self._reported, (self.tokens, self.watch.seconds)
        spent = self._reported[1] - seconds
        pace = (perf_counter() - self._begun) / (self.step - self._first_step)
        return Progress(
            step=self.step,
            steps=spec.steps,
            tokens=self.tokens,
            loss=self.loss,
            seconds=self._reported[1],
            tokens_per_second=(self.tokens - tokens) / spent if spent > 0 else 0.0,
            seconds_left=pace * (spec.steps - self.step),
            scores=dict(self.scores),
        )
