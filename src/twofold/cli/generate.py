"""``twofold generate``: a trained language model goes on with a text, and shows what that takes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from twofold.cli.commands import INTERRUPTED
from twofold.cli.examples import Example
from twofold.cli.fitting import BackendName, Device, computing_on
from twofold.cli.output import Json, show_json
from twofold.cli.progress import time_text
from twofold.cli.run_folder import RUN_FILE, model_folder
from twofold.errors import TwofoldError
from twofold.lazy import Lazy
from twofold.picture import LABEL, bytes_text, change_text

if TYPE_CHECKING:
    from twofold import generation, models
    from twofold.generation import codec
else:
    generation, models, codec = Lazy("twofold.generation"), Lazy("twofold.models"), Lazy("twofold.generation.codec")

EXAMPLES = (
    Example(
        command='twofold generate runs/notes --prompt "def main("',
        purpose="What does a trained model go on with?",
    ),
    Example(
        command="twofold generate runs/notes --prompt @notes.txt --greedy --max-new-tokens 500",
        purpose="A prompt from a file (or, as -, from standard input); only the text goes to standard output.",
    ),
    Example(
        command='twofold generate runs/notes --prompt "import " --cache quantized --bits 4 --seed 7',
        purpose="With a cache of 4 bits per float, and another draw.",
    ),
    Example(
        command='twofold generate runs/notes --prompt "import " --cache static --bits 8',
        purpose="With room taken at once, for codes of 8 bits that the kernels read as they are.",
    ),
    Example(command='twofold generate runs/notes --prompt "x" --json | jq .cache.nbytes', purpose="For programs."),
)
PANEL = "Choice of tokens"


def command(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A folder that `save_pretrained` or `twofold train` wrote.")],
    *,
    prompt: Annotated[str, typer.Option(help="The text to go on with; @PATH: a file's; -: standard input's.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to make at most.", metavar="N", min=1)] = 200,
    cache: Annotated[
        Literal["dynamic", "static", "quantized", "offloaded"], typer.Option(help="How the cache is held.")
    ] = "dynamic",
    bits: Annotated[
        Literal["8", "4"] | None,
        typer.Option(help="Bits per float of a quantized cache, or 8 of a static one.", show_default="8 if quantized"),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Logits are divided by it.", metavar="X", rich_help_panel=PANEL)
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(help="Draw from the N likeliest; 0: from all.", metavar="N", min=0, rich_help_panel=PANEL)
    ] = 0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest of this probability.", metavar="X", rich_help_panel=PANEL)
    ] = 1.0,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Take the likeliest token, and draw none.", rich_help_panel=PANEL)
    ] = False,
    seed: Annotated[int, typer.Option(help="The same seed draws the same text.", min=0, rich_help_panel=PANEL)] = 0,
    device: Device = "auto",
    backend: BackendName = "auto",
    as_json: Json = False,
) -> None:
    """Go on with a text: it is shown as it comes, and at the end its speed and what the cache held."""
    _refuse_contradictions(context, greedy=greedy, cache=cache)
    text = _prompt(prompt)
    with computing_on(device) as place, _leaving_with_the_reader():
        sampling = generation.Sampling(greedy=greedy, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        home = model_folder(folder) if (folder / RUN_FILE).is_file() else folder
        model = models.load_model(home, backend=backend).to(place)
        if not isinstance(model, models.TwofoldForCausalLM):
            raise TwofoldError(f"The model in {home} is a {model.config.architecture}: only a causal_lm makes text.")
        with _interruptible() as interruption:
            made = generation.generate(
                model,
                codec.codec_of(home, model.config.spec),
                text,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                cache=cache,
                bits=int(bits or 0),
                say=len if as_json else _say,
                stop=interruption.asked,
            )
    tie = str(model.config.spec.tie)
    if as_json:
        show_json({"model": str(home), "tie": tie, "sampling": asdict(sampling), **made.to_dict()})
    else:
        sys.stdout.write("" if made.text.endswith("\n") else "\n")
        sys.stdout.flush()
        Console(stderr=True, highlight=False).print(_table(made, tie))
    if made.ended_by == "interruption":
        raise typer.Exit(INTERRUPTED)


def _refuse_contradictions(context: typer.Context, *, greedy: bool, cache: str) -> None:
    """Raise TwofoldError for an option that would have no effect."""
    given = [
        name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    for name in ("temperature", "top_k", "top_p", "seed"):
        if greedy and name in given:
            raise TwofoldError(
                f"--greedy draws nothing, so --{name.replace('_', '-')} has no effect: leave one of them out."
            )
    if cache not in ("quantized", "static") and "bits" in given:
        raise TwofoldError(
            f"A {cache} cache holds floats as they are computed: leave --bits out, or say --cache quantized or static."
        )


def _prompt(prompt: str) -> str:
    """The prompt itself, or what ``-`` and ``@PATH`` stand for."""
    if prompt == "-":
        return _decoded(sys.stdin.buffer.read(), "standard input")
    if prompt.startswith("@"):
        path = Path(prompt[1:])
        if not path.is_file():
            raise TwofoldError(
                f"There is no file {path} to take the prompt from: to begin a prompt with @, give it through standard input (-)."
            )
        return _decoded(path.read_bytes(), str(path))
    return _decoded(os.fsencode(prompt), "the command line")


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TwofoldError(
            f"The prompt from {where} is not UTF-8 text (byte {error.start}): convert it first."
        ) from None


# Ctrl-C


class _Interruption:
    """Whether somebody pressed Ctrl-C."""

    def __init__(self) -> None:
        self._asked = False

    def asked(self) -> bool:
        return self._asked

    def ask(self, _: int, __: FrameType | None) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the second time it means at once


@contextmanager
def _interruptible() -> Iterator[_Interruption]:
    """Within the block Ctrl-C asks for an end after the token that is being made."""
    interruption = _Interruption()
    before = signal.signal(signal.SIGINT, interruption.ask)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _leaving_with_the_reader() -> Iterator[None]:
    """A reader that has what it wants (`| head`) ends the command, and is no failure, as which Typer would take it."""
    try:
        yield
    except BrokenPipeError:
        raise typer.Exit from None


# What is shown

# What a model says may be any byte; in a terminal some would move the cursor or change colours.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_PICTURES |= dict.fromkeys(range(128, 160), 0xFFFD)


def _say(piece: str) -> None:
    """A piece of text, at once."""
    if sys.stdout.isatty():
        piece = piece.translate(_PICTURES)
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(piece.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def _table(made: generation.Generated, tie: str) -> Table:
    held = made.cache
    speed = f"{made.tokens_per_second:,.1f} tokens per second" if made.tokens_per_second else "no second token"
    bits = f", {held.bits} bits" if held.bits else ""
    change = change_text(held.nbytes, held.reference_bytes)
    rows = {
        "tokens": f"{made.prompt_tokens:,} read, {made.new_tokens:,} made; ended by {made.ended_by}",
        "time": f"{made.seconds_to_first_token:.3f} s to the first token, {time_text(made.seconds)} in all",
        "speed": speed,
        "cache": f"{bytes_text(held.nbytes)} for {held.tokens:,} tokens ({tie}, {held.kind}{bits})",
        "(Q, K, V)": f"{bytes_text(held.reference_bytes)} with the same heads (this model: {change})",
    }
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        table.add_row(Text(name, style=LABEL), Text(text, overflow="fold"))
    return table
