"""``twofold doctor``: what this machine has, and what works on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from twofold.cli.commands import RUN_FAILED
from twofold.cli.examples import Example
from twofold.cli.output import Json, show, show_json
from twofold.lazy import Lazy

if TYPE_CHECKING:
    from twofold import doctor
else:
    doctor = Lazy("twofold.doctor")

EXAMPLES = (
    Example(command="twofold doctor", purpose="What has this machine, and what works on it?"),
    Example(
        command="twofold doctor --folder /data/runs",
        purpose="Is there room in another folder, and may one write there?",
    ),
    Example(command="twofold doctor --json | jq .works", purpose="For programs; the exit code says it too."),
)
STYLES = {"works": "green", "fails": "bold red", "absent": "yellow"}


def command(
    *,
    folder: Annotated[Path, typer.Option(help="Where runs would be kept.")] = Path(),
    as_json: Json = False,
) -> None:
    """What this machine has and what works on it. The exit code is 0 if everything that is needed works."""
    diagnosis = doctor.diagnose(folder)
    if as_json:
        show_json(diagnosis.to_dict())
    else:
        show(*_page(diagnosis))
    if not diagnosis.works:
        raise typer.Exit(RUN_FAILED)


def _page(diagnosis: doctor.Diagnosis) -> list[RenderableType]:
    return [
        Text(f"Twofold {diagnosis.version}", style="bold"),
        Text(),
        _facts(diagnosis.machine),
        Text(),
        _facts(diagnosis.packages),
        Text(),
        _facts({f"extra {name}": state for name, state in diagnosis.extras.items()}),
        Text(),
        _checks(diagnosis.checks),
        Text(),
        _verdict(diagnosis),
    ]


def _facts(facts: Any) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(Text(name), Text(value))
    return table


def _checks(checks: tuple[doctor.Check, ...]) -> Table:
    table = Table.grid(padding=(0, 2))
    for check in checks:
        seconds = f"{check.seconds:.1f} s" if check.seconds >= 0.05 else ""
        table.add_row(
            Text(check.name, style="bold cyan"),
            Text(check.outcome, style=STYLES[check.outcome]),
            Text(check.detail, overflow="fold"),
            Text(seconds, style="dim", justify="right"),
        )
    return table


def _verdict(diagnosis: doctor.Diagnosis) -> Text:
    broken = [check.name for check in diagnosis.checks if check.is_core and check.outcome != "works"]
    if broken:
        return Text(f"Twofold does not work here yet. First mend: {', '.join(broken)}.", style="bold red")
    return Text("Everything that Twofold needs works here.", style="bold green")
