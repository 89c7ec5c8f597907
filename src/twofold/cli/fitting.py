"""The options that say what is learned, how, and where: task, training, device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from twofold.cli.pairs import read_pairs
from twofold.errors import TwofoldError
from twofold.lazy import Lazy
from twofold.task_spec import TaskSpec
from twofold.training.spec import Precision, Schedule, TrainingSpec

if TYPE_CHECKING:
    import torch

    from twofold import kernels, tasks
    from twofold.models import quiet
else:
    torch, kernels, tasks = Lazy("torch"), Lazy("twofold.kernels"), Lazy("twofold.tasks")
    quiet = Lazy("twofold.models.quiet")

PANEL = "Training"
CPU_VARIABLE = "ACCELERATE_USE_CPU"
"""How Accelerate, which places the models that are trained, is told to leave a GPU alone."""


def complete_task(incomplete: str) -> list[str]:
    """Task names for the shell's completion."""
    return [name for name in tasks.TASKS if name.startswith(incomplete)]


def complete_backend(incomplete: str) -> list[str]:
    """Names of attention backends for the shell's completion."""
    return [name for name in ("auto", *kernels.BACKENDS) if name.startswith(incomplete)]


TaskName = Annotated[str, typer.Option(help="What to learn.", metavar="NAME", autocompletion=complete_task)]
TaskOptions = Annotated[
    list[str] | None,
    typer.Option("--option", help="An option of the task, such as context=256.", metavar="NAME=VALUE"),
]
BackendName = Annotated[str, typer.Option(help="Attention backend.", metavar="NAME", autocompletion=complete_backend)]
Device = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute; auto takes a GPU where there is one.")
]


def task_spec(task: str, option: list[str] | None) -> TaskSpec:
    """The task that ``--task`` and ``--option`` name."""
    return TaskSpec(name=task, options=read_pairs(option, "--option"))


def _option(text: str, metavar: str | None = None, **settings: Any) -> typer.models.OptionInfo:
    info: typer.models.OptionInfo = typer.Option(help=text, metavar=metavar, rich_help_panel=PANEL, **settings)
    return info


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """A training as given on the command line; the fields of :class:`TrainingSpec` that are asked for often have options of their own."""

    steps: Annotated[int, _option("Optimiser steps.", "N", min=1)] = 1000
    batch_size: Annotated[int, _option("Examples in a step.", "N", min=1)] = 32
    accumulation_steps: Annotated[int, _option("Parts in which a step's examples are computed.", "N", min=1)] = 1
    learning_rate: Annotated[float, _option("Highest learning rate.", "X")] = 3e-3
    schedule: Annotated[Schedule, _option("How the learning rate falls.")] = "cosine"
    warmup_steps: Annotated[
        int | None,
        _option("Steps in which the learning rate rises.", "N", min=0, show_default="a tenth of the steps"),
    ] = None
    weight_decay: Annotated[float, _option("Weight decay of matrices.", "X", min=0)] = 0.1
    precision: Annotated[Precision, _option("Mixed precision.")] = "no"
    evaluate_every: Annotated[int, _option("Steps between evaluations; 0: only at the end.", "N", min=0)] = 0
    checkpoint_every: Annotated[int, _option("Steps between checkpoints; 0: none before the end.", "N", min=0)] = 100
    training_field: Annotated[
        list[str] | None, _option("Any other field of a training, such as clip_norm=0.", "NAME=VALUE")
    ] = None

    def spec(self) -> TrainingSpec:
        """The training. Raises TwofoldError for a field that is not known, given twice, or out of range."""
        given = {name: value for name, value in asdict(self).items() if name != "training_field"}
        if self.warmup_steps is None:
            given["warmup_steps"] = self.steps // 10
        others = read_pairs(self.training_field, "--training-field")
        known = [field.name for field in fields(TrainingSpec)]
        for name in others:
            if name in given:
                option = f"--{name.replace('_', '-')}"
                raise TwofoldError(f"--training-field gives {name}, which has an option of its own: use {option}.")
            if name not in known:
                raise TwofoldError(f"A training has no field {name!r}: its fields are {', '.join(known)}.")
        try:
            return TrainingSpec(**given, **others)
        except TypeError as error:
            raise TwofoldError(f"A --training-field does not fit ({error}): give a number where one belongs.") from None


@contextmanager
def computing_on(device: str) -> Iterator[torch.device]:
    """Computation within the block happens there. Raises TwofoldError where a GPU is asked for and there is none."""
    has_gpu = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise TwofoldError(
            "There is no GPU that torch can use (--device cuda): use --device cpu, and see what `twofold doctor` says."
        )
    before = os.environ.get(CPU_VARIABLE)
    if not has_gpu:
        os.environ[CPU_VARIABLE] = "true"
    try:
        with quiet.without_bars():
            yield torch.device("cuda" if has_gpu else "cpu")
    finally:
        if before is None:
            os.environ.pop(CPU_VARIABLE, None)
        else:
            os.environ[CPU_VARIABLE] = before
