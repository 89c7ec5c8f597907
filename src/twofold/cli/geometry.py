"""``twofold geometry``: where queries, keys and values of a trained model lie, as a page and as measures."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from twofold.cli.examples import Example
from twofold.cli.fitting import Device, computing_on
from twofold.cli.output import Json, show, show_json
from twofold.cli.run_folder import RUN_FILE, model_folder, read_run
from twofold.errors import TwofoldError
from twofold.lazy import Lazy
from twofold.picture import LABEL
from twofold.storage import read_json, write_text, writing

if TYPE_CHECKING:
    from twofold import geometry
    from twofold.geometry import page
else:
    geometry, page = Lazy("twofold.geometry"), Lazy("twofold.geometry.page")

EXAMPLES = (
    Example(
        command="twofold geometry runs/notes",
        purpose="The page geometry.html of a trained model, which needs no network.",
    ),
    Example(
        command="twofold geometry runs/notes --text 'to be or not to be' --output pages/be.html",
        purpose="What does it look at in this text?",
    ),
    Example(
        command="twofold geometry ~/models/gpt2 --file notes.txt --layer 0 --layer 5 --layer 11",
        purpose="Some layers of a model of Transformers', on a file.",
    ),
    Example(command="twofold geometry runs/notes --json | jq .measures[0].mean", purpose="For programs."),
)
PANEL = "What is measured"


def command(
    model: Annotated[Path, typer.Argument(help="A folder of a run or of a model, of ours or of Transformers'.")],
    *,
    text: Annotated[str, typer.Option(help="The text to read.", show_default="one that comes with Twofold")] = "",
    file: Annotated[Path | None, typer.Option(help="A file of UTF-8 text to read.", show_default=False)] = None,
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("geometry.html"),
    picture: Annotated[
        Path | None,
        typer.Option(help="An SVG file to write, of the view that the page opens with.", show_default=False),
    ] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(
            help="A layer, from 0; may be said again.", metavar="N", show_default="8 of them", rich_help_panel=PANEL
        ),
    ] = None,
    head: Annotated[
        list[int] | None,
        typer.Option(help="A query head to draw, from 0.", metavar="N", show_default="up to 24", rich_help_panel=PANEL),
    ] = None,
    shown: Annotated[
        int, typer.Option(help="Tokens to draw.", metavar="N", min=2, max=256, rich_help_panel=PANEL)
    ] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens to measure.", metavar="N", min=8, rich_help_panel=PANEL)] = 2048,
    context: Annotated[int, typer.Option(help="Tokens read at once.", metavar="N", min=8, rich_help_panel=PANEL)] = 256,
    draws: Annotated[
        int, typer.Option(help="Random heads to compare with.", metavar="N", min=2, rich_help_panel=PANEL)
    ] = 100,
    seed: Annotated[int, typer.Option(help="Draws the random heads.", min=0, rich_help_panel=PANEL)] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """See where queries, keys and values lie: a page to turn them in, and measures beside random matrices."""
    written = _text(text, file)
    with computing_on(device) as place:
        question = geometry.Question(
            text=written or geometry.sample_text(),
            tokens=tokens,
            context=context,
            shown=shown,
            layers=tuple(layer or ()),
            heads=tuple(head or ()),
            draws=draws,
            seed=seed,
        )
        opened = geometry.open_model(_folder(model), name=model.expanduser().resolve().name, device=place)
        found = geometry.see(replace(opened, run=_run(model)), question)
        made_by = _made_by(model, question, text=text, file=file, output=output)
        files = {output: page.html(found, made_by)} | ({picture: page.picture(found)} if picture else {})
    for path, content in files.items():
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, content)
    told = found.to_dict() | {"command": made_by, "page": str(output)}
    if as_json:
        show_json(told)
    else:
        show(_table(told), Text(f"The page is {output}."))


def _folder(model: Path) -> Path:
    model = model.expanduser()
    return model_folder(model) if (model / RUN_FILE).is_file() else model


def _run(model: Path) -> dict[str, Any]:
    """How a run's model was trained; empty for a model that is no run's."""
    folder = model.expanduser()
    if not (folder / RUN_FILE).is_file():
        return {}
    outcome = read_json(folder / "outcome.json")
    kept = {name: outcome.get(name, "") for name in ("data_hash", "data_order", "tokens")}
    return read_run(folder).to_dict() | {"scores": outcome.get("scores", {})} | kept


def _text(text: str, file: Path | None) -> str:
    """What was asked for; empty: nothing. Raises TwofoldError for two texts, and for a file that holds none."""
    if file is None:
        return text
    if text:
        raise TwofoldError("--text and --file both give a text: leave one of them out.")
    if not file.is_file():
        raise TwofoldError(f"There is no file {file} to read: name a text file, or give --text.")
    try:
        written = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TwofoldError(f"{file} is not UTF-8 text (byte {error.start}): convert it first.") from None
    if not written:
        raise TwofoldError(f"{file} is empty: name a file that holds a text.")
    return written


def _made_by(model: Path, question: Any, *, text: str, file: Path | None, output: Path) -> str:
    """The command that makes the page again: what is as usual is left out."""
    words = ["twofold", "geometry", model.as_posix()]
    words += ["--text", text] if text else ["--file", file.as_posix()] if file else []
    usual = geometry.Question(text="")
    for name in ("shown", "tokens", "context", "draws", "seed"):
        if getattr(question, name) != getattr(usual, name):
            words += [f"--{name}", str(getattr(question, name))]
    for name, numbers in (("--layer", question.layers), ("--head", question.heads)):
        words += [word for number in numbers for word in (name, str(number))]
    return shlex.join([*words, "--output", output.as_posix()])


def _table(told: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style=LABEL, title_justify="left")
    table.add_column("")
    for header in ("here", "random\n95% range", "outside", *(["untrained"] if told["untrained"] else [])):
        table.add_column(header, justify="right", no_wrap=True)
    for row in told["measures"]:
        random = row["random"]
        between, outside = f"{random['low']:.2f} … {random['high']:.2f}", f"{row['outside']} of {row['of']}"
        if row["given_by_the_tie"] or not random["draws"]:
            between, outside = "by the tie" if row["given_by_the_tie"] else "", ""
        untrained = [f"{row['untrained']:.2f}"] if told["untrained"] else []
        table.add_row(row["name"], f"{row['mean']:.2f}", between, outside, *untrained)
    return table
