"""The command line: one file for each command, and nothing heavy imported before a command needs it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Annotated

import typer

from twofold._version import __version__
from twofold.cli import (
    claims,
    doctor,
    estimate,
    evaluate,
    explain,
    export,
    generate,
    geometry,
    halve,
    harness,
    study,
    train,
)
from twofold.cli.commands import Commands
from twofold.cli.examples import epilog
from twofold.cli.study import overview, report, run

COMMANDS: Mapping[str, ModuleType] = MappingProxyType(
    {
        "explain": explain,
        "estimate": estimate,
        "train": train,
        "eval": evaluate,
        "generate": generate,
        "export": export,
        "geometry": geometry,
        "halve": halve,
        "harness": harness,
        "study run": run,
        "study report": report,
        "study list": overview,
        "claims": claims,
        "doctor": doctor,
    }
)
"""Every command and the module that holds its ``command`` and its ``EXAMPLES``."""

app = typer.Typer(
    name="twofold",
    cls=Commands,
    rich_markup_mode="rich",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"twofold {__version__}")
        raise typer.Exit


@app.callback()
def twofold(
    context: typer.Context,
    *,
    version: Annotated[  # noqa: ARG001 - acted upon by its callback
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Attention that needs fewer than three projections: write a tie, train it, see what it costs."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for _name, _module in COMMANDS.items():
    if " " not in _name:
        app.command(_name, epilog=epilog(_module.EXAMPLES))(_module.command)
app.add_typer(study.app)


def main() -> None:
    """The entry point of the ``twofold`` command."""
    app(prog_name="twofold")
