"""``twofold eval``: a trained model on its task's held-out data, or on other data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from twofold.cli.examples import Example
from twofold.cli.fitting import BackendName, Device, TaskName, TaskOptions, computing_on, task_spec
from twofold.cli.output import Json, show, show_json
from twofold.cli.run_folder import model_folder, read_run
from twofold.errors import TwofoldError
from twofold.lazy import Lazy
from twofold.task_spec import TaskSpec
from twofold.training.spec import RunSpec

if TYPE_CHECKING:
    from twofold import models, tasks
    from twofold.spec import ModelSpec
    from twofold.training import evaluation
else:
    models, tasks, evaluation = Lazy("twofold.models"), Lazy("twofold.tasks"), Lazy("twofold.training.evaluation")

EXAMPLES = (
    Example(
        command="twofold eval runs/notes",
        purpose="How well does the model of a run do on what it has not seen in training?",
    ),
    Example(
        command="twofold eval runs/notes --option path=other.txt",
        purpose="The same model on the held-out part of another text.",
    ),
    Example(command="twofold eval runs/notes --json | jq .scores", purpose="For programs."),
)


def command(
    folder: Annotated[Path, typer.Argument(help="A folder that `twofold train` wrote.")],
    *,
    task: TaskName = "",
    option: TaskOptions = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples at a time.", metavar="N", min=1, show_default="as trained")
    ] = None,
    device: Device = "auto",
    backend: BackendName = "auto",
    as_json: Json = False,
) -> None:
    """Evaluate a trained model on its task's held-out data, or on that of another task or other options."""
    run = read_run(folder)
    chosen = _task_of(run, task_spec(task or run.task.name, option))
    with computing_on(device) as place:
        model = models.load_model(model_folder(folder), backend=backend).to(place)
        data = tasks.load_task(chosen)
        _check(model.config.spec, data.model_fields, folder, chosen)
        scores = evaluation.evaluate(model, data, batch_size=batch_size or run.training.batch_size)
    told = {
        "scores": scores,
        "score": data.score,
        "task": {"name": chosen.name, "options": dict(chosen.options)},
        "held_out_size": data.held_out_size,
        "data_hash": data.data_hash,
        "folder": str(folder),
    }
    if as_json:
        show_json(told)
    else:
        show(_table(told, data.description))


def _task_of(run: RunSpec, asked: TaskSpec) -> TaskSpec:
    """The run's own task with the options that were given in place of its own; another task has only those that were given."""
    if asked.name != run.task.name:
        return asked
    return TaskSpec(name=run.task.name, options={**run.task.options, **asked.options})


def _check(model: ModelSpec, dictated: Mapping[str, Any], folder: Path, task: TaskSpec) -> None:
    """Raise TwofoldError where the model does not read what the task gives."""
    for name, wanted in dictated.items():
        has = getattr(model, name)
        if name != "positions" and has != wanted:
            raise TwofoldError(
                f"The model of {folder} has {name}={has}, but {task.name} with these options needs {wanted}: evaluate it on what it was trained for."
            )


def _table(told: dict[str, Any], description: str) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in told["scores"].items():
        table.add_row(Text(name.replace("_", " "), style="bold cyan"), Text(f"{value:.4f}"))
    table.add_row(Text("on", style="bold cyan"), Text(f"{told['held_out_size']:,} held-out examples: {description}"))
    return table
