"""``twofold study report``: write the report of a study folder again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twofold.cli.examples import Example
from twofold.cli.output import Json, show_json
from twofold.lazy import Lazy

if TYPE_CHECKING:
    from twofold import report
else:
    report = Lazy("twofold.report")

EXAMPLES = (
    Example(
        command="twofold study report studies/smoke",
        purpose="Write the report of what is there, even while runs go on.",
    ),
    Example(
        command="twofold study report studies/smoke --json | jq -r .files[0]",
        purpose="Where is the page? For programs.",
    ),
)


def command(
    folder: Annotated[Path, typer.Argument(help="A folder that `twofold study run` wrote.")],
    *,
    as_json: Json = False,
) -> None:
    """Write a study's report again: one HTML page, Markdown, CSV and JSON."""
    files = report.write(folder)
    if as_json:
        show_json({"folder": str(folder), "files": [str(path) for path in files]})
        return
    for path in files:
        typer.echo(path)
