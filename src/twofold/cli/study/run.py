"""``twofold study run``: run a study, and write its report as runs end."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twofold.cli.commands import RUN_FAILED
from twofold.cli.examples import Example
from twofold.cli.output import Json, show_json_line
from twofold.cli.progress import EndedRun, StudyProgressBars, time_text
from twofold.lazy import Lazy

if TYPE_CHECKING:
    from twofold import report
    from twofold.study import plan as plans
    from twofold.study import runner
else:
    report, plans, runner = Lazy("twofold.report"), Lazy("twofold.study.plan"), Lazy("twofold.study.runner")

EXAMPLES = (
    Example(command="twofold study run smoke", purpose="Does everything work? A whole study in a minute."),
    Example(
        command="twofold study run laptop --folder studies/mine",
        purpose="The main study, in a folder of your choice; the same command again resumes it.",
    ),
    Example(
        command="twofold study run paper-synthetic --only reverse --workers 2",
        purpose="A part of a large study, in two processes.",
    ),
    Example(command="twofold study run my-study.toml", purpose="A study of your own."),
    Example(
        command="twofold study run smoke --json | jq -r 'select(.page).page'",
        purpose="For programs: a line for each run that ends.",
    ),
)


def complete_study(incomplete: str) -> list[str]:
    """Names of built-in studies for the shell's completion."""
    return [name for name in plans.names() if name.startswith(incomplete)]


def command(
    study: Annotated[
        str,
        typer.Argument(help="A built-in study, or the path of a TOML or YAML file.", autocompletion=complete_study),
    ],
    *,
    folder: Annotated[Path | None, typer.Option(help="Where results are kept.", show_default="studies/NAME")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that train at a time.", metavar="N", min=1, show_default="all cores")
    ] = None,
    population: Annotated[
        int | None,
        typer.Option(
            help="The most runs that are trained as one program.",
            metavar="N",
            min=1,
            show_default="as many as a graphics processor's memory holds, 1 on a CPU",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Run this task, variant or seed-N only; may be given again.", metavar="NAME"),
    ] = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on although plan or code have changed; the report says so.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a study, and write its report as runs end. The same command again goes on where it was stopped."""
    plan = plans.load_plan(study)
    place, page = folder or Path("studies") / plan.name, list[Path]()

    def write_report() -> None:
        page[:] = report.write(place)

    asked = _asked(study, folder, only, workers=workers, population=population)
    with StudyProgressBars(plan.name, place, ended=_print_line if as_json else None) as bars:
        runner.run_study(
            plan,
            place,
            command=asked,
            workers=workers,
            population=population,
            only=only or (),
            accept_changes=accept_changes,
            observe=bars.report,
            on_change=write_report,
        )
    last = bars.last
    if as_json:
        show_json_line(
            {"event": "finished", "done": last.done, "failed": last.failed, "seconds": last.seconds_elapsed}
            | {"folder": str(place), "page": str(page[0]), "files": [str(path) for path in page]}
        )
    else:
        failed = f", {last.failed} failed" * bool(last.failed)
        typer.echo(f"{last.done} of {last.total} runs done{failed}, in {time_text(last.seconds_elapsed)}.")
        typer.echo(f"Report: {page[0]}")
    if last.failed:
        raise typer.Exit(RUN_FAILED)


def _asked(study: str, folder: Path | None, only: list[str] | None, **numbers: int | None) -> str:
    """The command line that asks for the same, to stand beside the numbers."""
    words = ["twofold", "study", "run", study]
    words += ["--folder", str(folder)] if folder else []
    words += [word for name, number in numbers.items() if number for word in (f"--{name}", str(number))]
    words += [word for name in only or () for word in ("--only", name)]
    return shlex.join(words)


def _print_line(run: EndedRun) -> None:
    show_json_line({"event": "run", **asdict(run)})
