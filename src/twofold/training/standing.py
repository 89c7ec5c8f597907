"""What every way to train a run agrees on: whether model and task fit, where the run goes on, what is due at a step, and the account of its end."""

from __future__ import annotations

from collections.abc import Mapping

from twofold.cost import cached_floats_per_token, parameters
from twofold.errors import TwofoldError
from twofold.spec import ModelSpec
from twofold.tasks import Task
from twofold.training.checkpoint import Checkpoint, Checkpoints
from twofold.training.evaluation import check_held_out
from twofold.training.order import DataOrder
from twofold.training.progress import Outcome
from twofold.training.run_folder import RunFolder
from twofold.training.spec import RunSpec

_DICTATED = ("architecture", "vocab_size", "feature_size", "image_size", "patch_size", "num_channels", "num_labels")


def check_fit(model: ModelSpec, task: Task) -> None:
    """Raise TwofoldError where the task cannot be measured, and where the model cannot read the task's data or answer it; larger tables than the task needs are no fault."""
    check_held_out(task)
    for name in _DICTATED:
        has, needs = getattr(model, name), task.model_fields.get(name)
        fits = has >= needs if name in ("vocab_size", "num_labels") and needs is not None else has == needs
        if needs is not None and not fits:
            raise TwofoldError(
                f"The task {task.name} needs a model of {name} {needs!r}, and this one has {has!r}: change the model's {name}."
            )


def fitting_checkpoint(run: RunSpec, home: RunFolder, task: Task) -> Checkpoint | None:
    """The checkpoint from which the run goes on; None where it begins. Raises TwofoldError for one of another run or of other data."""
    checkpoint = Checkpoints(home.path).newest()
    if checkpoint is None:
        return None
    state = checkpoint.state
    if (state.fingerprint, state.data_hash) != (run.fingerprint, task.data_hash):
        what = "run" if state.fingerprint != run.fingerprint else "data"
        raise TwofoldError(
            f"The checkpoint of step {state.step} in {home.path} was made with other {what}: "
            f"bring back the {what} it was made with, or choose another folder."
        )
    return checkpoint


def is_due(run: RunSpec, step: int, every: int) -> bool:
    """Whether what is done every so many steps (0: only at the end) is done after this one."""
    return step == run.training.steps or (every > 0 and step % every == 0)


def tokens_at(run: RunSpec, task: Task, step: int) -> int:
    """Tokens trained on up to a step."""
    return step * run.training.batch_size * task.tokens_per_example


def outcome_of(run: RunSpec, task: Task, order: DataOrder, *, scores: Mapping[str, float], seconds: float) -> Outcome:
    """The account of a run that has taken all of its steps."""
    steps = run.training.steps
    return Outcome(
        scores=scores,
        parameters=parameters(run.model),
        seconds=seconds,
        tokens=tokens_at(run, task, steps),
        cached_floats_per_token=cached_floats_per_token(run.model),
        data_hash=task.data_hash,
        data_order=order.digest(steps),
    )
