"""``twofold study list``: the built-in studies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from twofold.cli.examples import Example
from twofold.cli.output import Json, show, show_json
from twofold.lazy import Lazy

if TYPE_CHECKING:
    from twofold.study import plan
else:
    plan = Lazy("twofold.study.plan")

EXAMPLES = (
    Example(
        command="twofold study list", purpose="Which studies are built in, and how many runs they are.", is_cheap=True
    ),
    Example(
        command="twofold study list --json", purpose="The same for programs, each with its whole plan.", is_cheap=True
    ),
)


def command(*, as_json: Json = False) -> None:
    """The built-in studies: what they ask, and how many runs they are."""
    studies = [plan.builtin(name) for name in plan.names()]
    if as_json:
        show_json([_as_dict(study) for study in studies])
        return
    table = Table.grid(padding=(0, 2))
    for study in studies:
        size = f"{len(study.variants)} variants, {len(study.planned_tasks)} tasks, {len(study.seeds)} seeds: {study.run_count:,} runs"
        table.add_row(Text(study.name, style="bold cyan"), Text(study.title, style="bold"))
        table.add_row("", Text(study.question))
        table.add_row("", Text(size, style="dim"))
        table.add_row("", "")
    show(
        table,
        Text(
            "Run one with: twofold study run NAME. A study of your own is a TOML or YAML file: twofold study run FILE."
        ),
    )


def _as_dict(study: plan.StudyPlan) -> dict[str, Any]:
    return {
        "name": study.name,
        "title": study.title,
        "question": study.question,
        "runs": study.run_count,
        "plan": study.to_dict(),
    }
