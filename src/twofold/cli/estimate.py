"""``twofold estimate``: the memory of a model's weights and cache, and what fits beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from twofold.cache_spec import CacheSpec
from twofold.cli.examples import Example
from twofold.cli.output import Json, show, show_json
from twofold.cli.run_folder import RUN_FILE, read_run
from twofold.cost import DTYPE_BYTES, dtype_bytes
from twofold.errors import TwofoldError
from twofold.estimate import Estimate, Holding, Question, estimate_layers, estimate_spec
from twofold.estimate.fields import position_limit
from twofold.estimate.layers import LayerCache, cache_bytes, prompt_bytes
from twofold.estimate.memory import read_memory
from twofold.estimate.ways import EXACT, EXPANDED, STORED, ways_of
from twofold.estimate.weights import stored_weights
from twofold.lazy import Lazy
from twofold.picture import LABEL, QUIET, bytes_text, change_text, count_text
from twofold.presets import PRESETS
from twofold.presets import preset as find_preset
from twofold.spec import ModelSpec
from twofold.storage import read_json

if TYPE_CHECKING:
    from twofold import models
    from twofold.estimate import engine
else:
    models, engine = Lazy("twofold.models"), Lazy("twofold.estimate.engine")

EXAMPLES = (
    Example(
        command="twofold estimate paper-300m --tokens 2048 --batch 64",
        purpose="A preset: its weights, and its cache with and without the tie, as computed and quantized.",
        is_cheap=True,
    ),
    Example(
        command='twofold estimate small --tie "(Q, K=V)" --memory 8GiB',
        purpose="How long a text, and how many at once, fit in 8 GiB?",
        is_cheap=True,
    ),
    Example(
        command="twofold estimate ~/models/gemma --tokens 131072 --memory 24GiB",
        purpose="Any Transformers model, by its folder or config.json: what its own cache stores, and what a tie would store.",
    ),
    Example(command="twofold estimate runs/notes --json | jq .holdings[0].cache_bytes", purpose="For programs."),
)
OURS = "twofold"
CODES = "codes"
MEANINGS: Mapping[str, str] = {
    STORED: "by Transformers' own cache",
    EXACT: "the same model; keys are turned when they are read",
    EXPANDED: "what the latent stands for",
}


def command(
    model: Annotated[
        str, typer.Argument(help="A preset, a folder with a config.json or a config.json, of ours or of Transformers.")
    ],
    *,
    tokens: Annotated[int, typer.Option(help="Tokens in the cache of each sequence.", min=1)] = 32768,
    batch: Annotated[int, typer.Option(help="Sequences at once.", min=1)] = 1,
    dtype: Annotated[
        str, typer.Option(help="Type of weights and cached floats.", autocompletion=lambda: list(DTYPE_BYTES))
    ] = "bf16",
    memory: Annotated[
        str, typer.Option(help="Memory for weights and cache, such as 24GiB or 24GB.", show_default=False)
    ] = "",
    tie: Annotated[
        list[str] | None,
        typer.Option(help="Ties of a model of ours.", show_default="its own, (Q, K, V), (Q, K=V)"),
    ] = None,
    as_json: Json = False,
) -> None:
    """The memory of a model: weights and KV cache, per tie and quantization, and what fits in a given memory."""
    question = Question(tokens=tokens, batch=batch, dtype=dtype, memory=read_memory(memory) if memory else 0)
    estimate = _estimate(model, question, tie or [])
    if as_json:
        show_json(estimate.to_dict())
    else:
        show(*_page(estimate))


def _estimate(model: str, question: Question, ties: list[str]) -> Estimate:
    path = Path(model).expanduser()
    if not path.exists():
        _refuse_missing(model)
        return estimate_spec(find_preset(model), model, question, ties)
    if (path / RUN_FILE).is_file():
        return estimate_spec(read_run(path).model, model, question, ties)
    values = _config(path)
    if values.get("model_type") == OURS:
        return estimate_spec(_spec(path, values), model, question, ties)
    if ties:
        raise TwofoldError(f"{model} is no model of ours, so it cannot be given a tie: leave --tie out.")
    return _of_transformers(path, question)


def _refuse_missing(model: str) -> None:
    """Raise TwofoldError for what is no file, and by its looks should have been one."""
    if any(sign in model for sign in "/\\.~"):
        raise TwofoldError(
            f"There is no {model}: name a folder with a config.json, a config.json, or a preset ({', '.join(PRESETS)})."
        )


def _config(path: Path) -> Mapping[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise TwofoldError(f"There is no model in {path}: it holds no config.json.")
    values = (
        read_json(file) if file.suffix == ".json" else {}
    )  # weights, if they are named, may be larger than the memory
    if not values:
        raise TwofoldError(f"{file} cannot be read as the JSON of a configuration: it is damaged, or something else.")
    if not isinstance(values.get("model_type"), str):
        raise TwofoldError(f"{file} does not say its model_type, so it is no configuration of a model.")
    return values


def _spec(path: Path, values: Mapping[str, Any]) -> ModelSpec:
    """A model of ours. What ``save_pretrained`` wrote is whole; where something is left out, the model's own class fills it in."""
    names = {field.name for field in fields(ModelSpec)} - {"num_labels"}
    if names <= set(values) and values["architecture"] == "causal_lm":
        return ModelSpec.from_dict({name: values[name] for name in names})
    return models.TwofoldConfig.from_pretrained(path, local_files_only=True).spec


def _of_transformers(path: Path, question: Question) -> Estimate:
    found = engine.inspect(path, question.dtype)
    width = dtype_bytes(question.dtype)
    stored = stored_weights(path if path.is_dir() else path.parent)
    return estimate_layers(
        ways_of(found.layers, found.read, found.fields),
        found.name,
        question,
        parameters=found.parameters,
        weight_bytes=stored.nbytes(width) if stored else found.parameters * width,
        position_limit=position_limit(found.fields),
        notes=[*found.notes, *_while_reading(found.layers, question)],
    )


def _while_reading(layers: Sequence[LayerCache], question: Question) -> Iterator[str]:
    """Windows are slices of what was read, and keep all of it alive until the next token comes."""
    width, tokens, batch = dtype_bytes(question.dtype), question.tokens, question.batch
    whole = prompt_bytes(layers, tokens, width=width, batch=batch)
    if whole > cache_bytes(layers, tokens, width=width, batch=batch, cache=CacheSpec()):
        yield f"Just after a prompt of {tokens:,} tokens is read at once, the windows still hold all of it: {bytes_text(whole)}."


# For people


def _page(estimate: Estimate) -> Iterator[RenderableType]:
    question = estimate.question
    count = f"{count_text(estimate.parameters)} parameters"
    batch = f"{question.batch} sequence{'s' if question.batch > 1 else ''}"
    yield Text(f"{estimate.model}: {count}; {batch} of {question.tokens:,} tokens, {question.dtype}", style="bold")
    yield _table(estimate)
    for note in estimate.notes:
        yield Text(note, style="yellow")
    for note in _small_print(estimate):
        yield Text(note, style=QUIET)


def _table(estimate: Estimate) -> Table:
    question = estimate.question
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style=LABEL)
    table.add_column("cache")
    table.add_column("floats", no_wrap=True)
    headers = ["size", "change", "with\nweights"]
    headers += ["longest\ntext", "largest\nbatch"] if question.memory else ["each\ntoken"]
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    first = estimate.holdings[0]
    for before, holding in zip((None, *estimate.holdings), estimate.holdings, strict=False):
        new = before is None or before.name != holding.name
        cells = [
            bytes_text(holding.cache_bytes),
            change_text(holding.cache_bytes, first.cache_bytes),
            bytes_text(holding.total_bytes),
        ]
        cells += (
            [_context(holding), f"{holding.largest_batch or 0:,}"]
            if question.memory
            else [bytes_text(holding.bytes_per_token)]
        )
        name = holding.name.replace(" | ", " |\n") if new else ""
        table.add_row(name, _floats(holding, question.dtype), *cells)
    return table


def _floats(holding: Holding, dtype: str) -> str:
    """What the cache is made of."""
    if not holding.bits:
        return dtype
    return f"{holding.bits} bits" if holding.group_size else CODES


def _context(holding: Holding) -> str:
    if holding.context_ends == "nothing":
        return "any"
    return f"{holding.longest_context or 0:,}" + (" (all)" if holding.context_ends == "positions" else "")


def _small_print(estimate: Estimate) -> Iterator[str]:
    """What the numbers are made of."""
    question = estimate.question
    weights = {holding.weight_bytes for holding in estimate.holdings}
    if len(weights) == 1:
        yield f"Weights: {bytes_text(weights.pop())}."
    for name in dict.fromkeys(holding.name for holding in estimate.holdings):
        if name in MEANINGS:
            yield f"{name[0].upper()}{name[1:]}: {MEANINGS[name]}."
    groups = sorted({holding.group_size for holding in estimate.holdings if holding.bits})
    if 0 in groups:
        groups.remove(0)
        yield f"{CODES[0].upper()}{CODES[1:]}: 8 bits as kernels read them, with a scale for each token of a head."
    if groups:
        yield f"8 and 4 bits: with a scale and a zero point for each {' or '.join(map(str, groups))} floats."
    if question.memory:
        each = f" of each of {question.batch:,}" if question.batch > 1 else ""
        yield f"Longest text{each}, and largest batch of {question.tokens:,} tokens each, in {bytes_text(question.memory)}."
    yield "What is being computed comes on top."
