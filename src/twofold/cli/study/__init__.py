"""``twofold study``: run a study, report on it, list what there is."""

from __future__ import annotations

import typer

from twofold.cli.commands import Commands
from twofold.cli.examples import epilog
from twofold.cli.study import overview, report, run

app = typer.Typer(
    name="study",
    cls=Commands,
    rich_markup_mode="rich",
    invoke_without_command=True,
)


@app.callback()
def study(context: typer.Context) -> None:
    """Studies: variants × seeds × tasks from one small file, run, resumed and reported."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command("run", epilog=epilog(run.EXAMPLES))(run.command)
app.command("report", epilog=epilog(report.EXAMPLES))(report.command)
app.command("list", epilog=epilog(overview.EXAMPLES))(overview.command)
