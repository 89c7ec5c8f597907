"""``twofold train``: one model on one task, stopped and resumed at will."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from twofold.cli.examples import Example
from twofold.cli.fitting import PANEL, BackendName, Device, Fitting, TaskName, TaskOptions, computing_on, task_spec
from twofold.cli.groups import grouped
from twofold.cli.output import Json, show, show_json_line
from twofold.cli.pairs import read_pairs
from twofold.cli.progress import RunProgress, time_text
from twofold.cli.run_folder import default_folder, read_run
from twofold.cli.sizes import ModelFields, Preset, Sizes
from twofold.cost import cached_bytes_per_token
from twofold.errors import TwofoldError
from twofold.lazy import Lazy
from twofold.presets import preset as find_preset
from twofold.spec import ModelSpec
from twofold.tie import TiePattern
from twofold.training.progress import Outcome, Progress
from twofold.training.spec import RunSpec

if TYPE_CHECKING:
    from twofold import tasks
    from twofold.training import trainer
else:
    tasks, trainer = Lazy("twofold.tasks"), Lazy("twofold.training.trainer")

EXAMPLES = (
    Example(
        command='twofold train --task text --tie "(Q, K=V)"',
        purpose="A small language model of bytes, on the source of Python's standard library.",
    ),
    Example(
        command="twofold train --task text --option path=notes.txt --folder runs/notes",
        purpose="The same on a text of your own.",
    ),
    Example(command="twofold train --folder runs/notes", purpose="Go on with the run that a folder holds."),
    Example(
        command='twofold train --task reverse --tie "V = Q - K" --layers 2 --evaluate-every 100',
        purpose="A model that learns to turn lists around, measured on the way.",
    ),
    Example(
        command="twofold train --task recall --steps 200 --json | jq .loss",
        purpose="For programs: one line for each report, and the outcome last.",
    ),
)
# A preset reads bytes. What a model reads and says is the task's to dictate, so it is cleared first.
NO_INPUTS = dict.fromkeys(("vocab_size", "feature_size", "image_size", "patch_size", "num_channels", "num_labels"), 0)


@grouped
def command(
    context: typer.Context,
    *,
    task: TaskName = "",
    option: TaskOptions = None,
    tie: Annotated[str, typer.Option(help='A tie such as "(Q, K=V)", or a pattern of ties.')] = "(Q, K, V)",
    folder: Annotated[
        Path | None, typer.Option(help="Where the run is kept.", show_default="runs/TASK-SETTINGS")
    ] = None,
    device: Device = "auto",
    backend: BackendName = "auto",
    preset: Preset = "tiny",
    sizes: Sizes,
    model_field: ModelFields = None,
    fitting: Fitting,
    compile_model: Annotated[
        bool, typer.Option("--compile", help="Compile the model with torch.compile.", rich_help_panel=PANEL)
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write curves for TensorBoard too.", rich_help_panel=PANEL)
    ] = False,
    seed: Annotated[int, typer.Option(help="Draws the first weights and the order of the data.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Train a model on a task. The same command again goes on where the run was stopped."""
    # What can be refused without torch is refused at once.
    changes = read_pairs(model_field, "--model-field") | {"tie": TiePattern.parse(tie)}
    start, training, chosen = find_preset(preset), fitting.spec(), task_spec(task, option)
    with computing_on(device):
        if task:
            loaded = tasks.load_task(chosen)
            model = model_of(start, sizes, loaded.model_fields, changes)
            run = RunSpec(task=chosen, model=model, training=training, seed=seed)
        else:
            run = _resumed(context, folder)
            loaded = tasks.load_task(run.task)
        place = folder or default_folder(run)
        carry_out = partial(
            trainer.train,
            run,
            place,
            task=loaded,
            backend=backend,
            tensorboard=tensorboard,
            compile_model=compile_model,
        )
        if as_json:
            outcome = carry_out(report=_print_line)
            ended = {"event": "outcome", **outcome.to_dict(), "folder": str(place), "model": str(place / "model")}
            show_json_line(ended)
            return
        with RunProgress(f"{run.task.name} {run.model.tie}") as bar:
            outcome = carry_out(report=bar.report)
        show(_table(run, outcome, place))


def model_of(preset: ModelSpec, sizes: Sizes, dictated: Mapping[str, Any], chosen: Mapping[str, Any]) -> ModelSpec:
    """The preset with sizes, fitted to a task: the fields that the task dictates win, and ``chosen`` ones come last.

    Raises TwofoldError where a chosen field contradicts the task; positions may be chosen freely.
    """
    for name, value in chosen.items():
        if name != "positions" and dictated.get(name, value) != value:
            raise TwofoldError(
                f"--model-field {name}={value} contradicts the task, which dictates {dictated[name]}: leave it out."
            )
    model = ModelSpec.from_dict({**preset.to_dict(), **NO_INPUTS, **dictated})
    return sizes.of(model).with_changes(**chosen)


def _resumed(context: typer.Context, folder: Path | None) -> RunSpec:
    """The run of a folder. Raises TwofoldError where something else is asked of it as well."""
    if folder is None:
        raise TwofoldError(
            f"Say what to learn: --task NAME, one of {', '.join(tasks.TASKS)}; or --folder of a run to go on with."
        )
    run = read_run(folder)
    allowed = {"folder", "device", "backend", "compile_model", "tensorboard", "as_json"}
    for name in context.params.keys() - allowed:
        if str(getattr(context.get_parameter_source(name), "name", "")) == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise TwofoldError(
                f"{folder} holds its own settings, and {option} would change them: leave {option} out, or say --task too."
            )
    return run


def _print_line(now: Progress) -> None:
    show_json_line({"event": "progress", **asdict(now)})


def _table(run: RunSpec, outcome: Outcome, folder: Path) -> Table:
    """What came of it, in a few lines."""
    table = Table.grid(padding=(0, 2))
    rows = {name.replace("_", " "): f"{value:.4f}" for name, value in outcome.scores.items()}
    rows |= {
        "parameters": f"{outcome.parameters:,}",
        "cache": f"{cached_bytes_per_token(run.model):,} bytes per token (bf16)",
        "training": f"{outcome.tokens:,} tokens in {time_text(outcome.seconds)}",
        "model": str(folder / "model"),
    }
    for name, text in rows.items():
        table.add_row(Text(name, style="bold cyan"), Text(text, overflow="fold"))
    return table
