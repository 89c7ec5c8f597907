"""``twofold harness``: lm-evaluation-harness on the models of a study, tie by tie."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from twofold.cli.examples import Example
from twofold.cli.fitting import Device, computing_on
from twofold.cli.output import Json, show, show_json
from twofold.errors import TwofoldError
from twofold.lazy import Lazy

if TYPE_CHECKING:
    from twofold import models
    from twofold.generation import codec
    from twofold.harness import comparison, questions, scoring, tokenizer
    from twofold.report import evidence, numbers
    from twofold.study import results as kept
    from twofold.study.plan import StudyPlan
    from twofold.study.results import Results
else:
    models, codec = Lazy("twofold.models"), Lazy("twofold.generation.codec")
    comparison, questions = Lazy("twofold.harness.comparison"), Lazy("twofold.harness.questions")
    scoring, tokenizer = Lazy("twofold.harness.scoring"), Lazy("twofold.harness.tokenizer")
    evidence, numbers = Lazy("twofold.report.evidence"), Lazy("twofold.report.numbers")
    kept = Lazy("twofold.study.results")

EXAMPLES = (
    Example(
        command="twofold harness studies/reasoning",
        purpose="The study's own held-out questions, asked through lm-evaluation-harness.",
    ),
    Example(
        command="twofold harness studies/laptop --only text --tasks hellaswag,arc_easy --limit 200",
        purpose="Tasks of the harness on every tie's model; the first time they need the network.",
    ),
    Example(
        command="twofold harness studies/reasoning --json | jq '.rows[] | select(.at_chance)'",
        purpose="Which scores carry no information?",
    ),
)
FOLDER = "harness"


def command(
    folder: Annotated[Path, typer.Argument(help="A folder that `twofold study run` wrote.")],
    *,
    tasks: Annotated[
        str, typer.Option(help="Tasks of the harness.", metavar="A,B", show_default="the study's own questions")
    ] = "",
    include: Annotated[
        Path | None, typer.Option(help="A folder with tasks of your own (YAML).", metavar="FOLDER")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Only models of this task of the study.", metavar="NAME")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Examples of each task, at most.", metavar="N", min=2)] = None,
    batch_size: Annotated[int, typer.Option(help="Examples at a time.", metavar="N", min=1)] = 64,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score the models of a study with lm-evaluation-harness: chance, standard error and power beside every number."""
    results = kept.Results.load(folder)
    chosen = _chosen(results, only)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    asked = _given(names, include, chosen) if names else _own(results.plan, folder / FOLDER, chosen)
    scored: dict[comparison.StudyModel, list[scoring.Score]] = {}
    with computing_on(device) as place:
        for model in chosen:
            if model.setting in asked:
                language_model = models.load_model(model.folder).to(place)
                reader = _tokenizer(model.folder, language_model.config.spec.vocab_size)
                scored[model] = asked[model.setting].scores(language_model, reader, batch_size=batch_size, limit=limit)
    rows = list(comparison.compare(scored, results.plan.reference))
    if as_json:
        show_json({"study": results.plan.name, "rows": [comparison.as_json(row) for row in rows]})
        return
    for key in dict.fromkeys((row.setting, row.task, row.metric) for row in rows):
        show(*_shown(key, [row for row in rows if (row.setting, row.task, row.metric) == key], results.plan))


def _chosen(results: Results, only: list[str] | None) -> list[comparison.StudyModel]:
    """The study's models, or those of some of its tasks."""
    found = comparison.study_models(results)
    known = list(dict.fromkeys(model.setting for model in found))
    for name in only or []:
        if name not in known:
            raise TwofoldError(f"{results.folder} has no models of a task {name!r}: use one of {', '.join(known)}.")
    return [model for model in found if not only or model.setting in only]


def _given(names: list[str], include: Path | None, chosen: list[comparison.StudyModel]) -> dict[str, scoring.Harness]:
    """The tasks that were named, for every setting."""
    harness = scoring.Harness(names, include)
    return {model.setting: harness for model in chosen}


def _own(plan: StudyPlan, folder: Path, chosen: list[comparison.StudyModel]) -> dict[str, scoring.Harness]:
    """By setting, the questions on which its models are measured, written as tasks of the harness."""
    settings = {model.setting for model in chosen}
    own = {setting: task for setting, task in questions.question_tasks(plan).items() if setting in settings}
    if not own:
        raise TwofoldError(
            f"The study {plan.name} asks no questions of its own: name tasks of the harness with --tasks, such as --tasks hellaswag."
        )
    for setting, task in own.items():
        questions.write_questions(task, questions.harness_name(setting), folder)
    return {setting: scoring.Harness([questions.harness_name(setting)], folder) for setting in own}


def _tokenizer(folder: Path, vocab_size: int) -> object:
    """The tokenizer in a model's folder, or bytes."""
    found = codec.codec_for(folder, vocab_size)
    return found.tokenizer if isinstance(found, codec.TokenizerCodec) else tokenizer.byte_tokenizer()


def _shown(key: tuple[str, str, str], rows: list[comparison.Row], plan: StudyPlan) -> list[Table | Text]:
    """A task's heading, its table, and what may be said of it."""
    setting, task, metric = key
    chance = rows[0].chance
    heading = Text(f"{task} by the models of {setting}", style="bold")
    heading.append(f": {numbers.metric_name(metric)}, {rows[0].examples:,} examples", style="default")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("variant", "score", "95% interval", "error", "difference", "95% interval", ""):
        table.add_column(name, justify="left" if name in ("variant", "") else "right")
    for row in rows:
        is_reference = row.variant == plan.reference
        table.add_row(
            row.label,
            numbers.number(row.score.mean, 3),
            numbers.bounds(row.score, 3),
            numbers.number(row.error, 3),
            numbers.NOTHING if is_reference else numbers.number(row.difference.mean, 3, sign=True),
            "" if is_reference else numbers.bounds(row.difference, 3, sign=True),
            evidence.AT_CHANCE if row.at_chance else "",
        )
    seen = [row.detectable for row in rows if math.isfinite(row.detectable)]
    label = next((row.label for row in rows if row.variant == plan.reference), plan.reference)
    seeds = max(row.difference.n for row in rows)
    power = evidence.power_statement((min(seen), max(seen)) if seen else (math.nan, math.nan), seeds, label)
    said = "Chance is not known." if chance is None else f"Chance is {numbers.number(chance, 3)}."
    return [heading, table, Text(f"{said} {power}\n")]
