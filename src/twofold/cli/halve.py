"""``twofold halve``: what one tensor in the cache would be for a model that others trained, and whether it is the same model still."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from twofold.cli.examples import Example
from twofold.cli.fitting import Device, computing_on
from twofold.cli.output import Json, show, show_json
from twofold.errors import TwofoldError
from twofold.lazy import Lazy
from twofold.picture import LABEL, QUIET, bytes_text, change_text
from twofold.storage import write_text, writing

if TYPE_CHECKING:
    from twofold.existing import halving, loading
    from twofold.report import halving as drawing
else:
    halving, loading = Lazy("twofold.existing.halving"), Lazy("twofold.existing.loading")
    drawing = Lazy("twofold.report.halving")

EXAMPLES = (
    Example(command="twofold halve ~/models/gemma-4-12b", purpose="Which layers keep one tensor, and what that saves."),
    Example(
        command='twofold halve ~/models/pythia-160m --text "It was the best of times" --new-tokens 40',
        purpose="And does it say the same? A text through both, token by token from the cache.",
    ),
    Example(
        command='twofold halve ~/models/gemma-4-12b --text "It was the best of times" --bits 4',
        purpose="The same with every cached token in 4 bits where one tensor is kept.",
    ),
    Example(
        command="twofold halve openai-community/gpt2 --max-error 0.05 --keep keys",
        purpose="A multi-head model: keep keys, in every layer where rounding costs values less than 5%.",
    ),
    Example(
        command="twofold halve ~/models/gemma-4-12b --picture layers.svg", purpose="The layers before and after, drawn."
    ),
    Example(command="twofold halve ~/models/gpt2 --json | jq '.layers[] | {name, kept}'", purpose="For programs."),
)
MEANINGS = {
    "stream": "one tensor is key and value",
    "keys": "keys (values follow)",
    "values": "values (keys follow)",
    "both": "both, as before",
}


def command(
    model: Annotated[str, typer.Argument(help="A folder with config.json and safetensors, or a name on the hub.")],
    *,
    text: Annotated[str, typer.Option(help="Compare answers on this text.", show_default=False)] = "",
    new_tokens: Annotated[int, typer.Option(help="Tokens of the answer to it.", metavar="N", min=1)] = 20,
    bits: Annotated[
        Literal["8", "4"] | None,
        typer.Option(help="With --text: hold the one tensor in so many bits, every token of it."),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(help="Lengths to count bytes at.", metavar="N", min=1, show_default="1024, 8192, 32768"),
    ] = None,
    keep: Annotated[
        Literal["auto", "keys", "values"],
        typer.Option(help="What multi-head layers keep; auto: what the other is better made from."),
    ] = "auto",
    max_error: Annotated[
        float,
        typer.Option(
            help="Leave layers as they are whose other tensor rounding would move by more.", metavar="X", min=0
        ),
    ] = 0.02,
    dtype: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="Type of the weights; auto: as stored.")
    ] = "auto",
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw layers before and after, at the last length.", metavar="FILE.svg", show_default=False),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Half the cache of a model that others trained, layer by layer: what is kept, what it saves and what it costs. Nothing is written."""
    lengths = tokens or [1024, 8192, 32768]
    if bits and not text:
        raise TwofoldError("--bits is for an answer that is compared: give --text too.")
    with computing_on(device) as place:
        loaded = loading.load(model, dtype=loading.DTYPES.get(dtype, "auto")).to(place)
        trial = None
        if text:
            report, trial = loading.attempt(
                loaded, model, text, new_tokens=new_tokens, keep=keep, max_error=max_error, bits=int(bits or 0)
            )
        else:
            report = halving.halve(loaded, keep=keep, max_error=max_error)
    if picture is not None:
        _draw(picture, report, lengths[-1])
    if as_json:
        show_json(_values(model, report, lengths, trial))
        return
    reasons = dict.fromkeys(layer.reason for layer in report.layers if layer.reason)
    show(
        _layers(report),
        *(Text(f"As before: {reason}.", style=QUIET) for reason in reasons),
        _bytes(report, lengths),
        *([Text(_maps(report), style=QUIET)] if report.map_bytes else []),
        *([] if trial is None else [_trial(trial)]),
    )


def _draw(path: Path, report: halving.HalvingReport, tokens: int) -> None:
    drawn = drawing.halving_picture(report.layers, model=report.model, tokens=tokens, width=report.dtype.itemsize)
    with writing(path.parent):
        write_text(path, drawn)


def _values(
    model: str, report: halving.HalvingReport, lengths: list[int], trial: loading.Trial | None
) -> dict[str, Any]:
    return {
        "model": model,
        "class": report.model,
        "dtype": str(report.dtype).removeprefix("torch."),
        "layers": [asdict(layer) for layer in report.layers],
        "map_bytes": report.map_bytes,
        "cache_bytes": [
            {"tokens": length, "before": report.cache_bytes(length, halved=False), "after": report.cache_bytes(length)}
            for length in lengths
        ],
        "trial": None if trial is None else asdict(trial),
    }


def _layers(report: halving.HalvingReport) -> Table:
    """Layers that are alike in one row; columns where they say something of some layer."""
    alike: dict[tuple[Any, ...], list[halving.LayerReport]] = {}
    for layer in report.layers:
        alike.setdefault((layer.kept, layer.cached_floats, layer.window_tokens), []).append(layer)
    columns: dict[str, list[str]] = {
        "layers": [f"{len(same)}" for same in alike.values()],
        "its cache holds": [MEANINGS[kept] for kept, *_ in alike],
        "floats per token": [" → ".join(f"{count:,}" for count in dict.fromkeys(floats)) for _, floats, _ in alike],
        "window": [f"{window:,}" if window else "" for *_, window in alike],
    }
    if any(layer.measured_error for layer in report.layers):
        columns["error"] = [f"{max(layer.measured_error for layer in same):.2g}" for same in alike.values()]
    columns["arithmetic"] = [
        f"{max(layer.arithmetic for layer in same):.3g} ×" if same[0].is_halved else "" for same in alike.values()
    ]
    said = {name: cells for name, cells in columns.items() if any(cells)}
    table = Table(box=box.SIMPLE_HEAD, header_style=LABEL, pad_edge=False)
    for name in said:
        is_words = name == "its cache holds"
        table.add_column(name, justify="left" if is_words else "right", no_wrap=not is_words)
    for cells in zip(*said.values(), strict=True):
        table.add_row(*cells)
    return table


def _bytes(report: halving.HalvingReport, lengths: list[int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style=LABEL, pad_edge=False)
    for name in ("tokens", "cache before", "after", "change"):
        table.add_column(name, justify="right")
    for length in lengths:
        before, after = report.cache_bytes(length, halved=False), report.cache_bytes(length)
        table.add_row(f"{length:,}", bytes_text(before), bytes_text(after), change_text(after, before))
    return table


def _maps(report: halving.HalvingReport) -> str:
    """What it costs in memory, and when that has come back."""
    saved = report.cache_bytes(1, halved=False) - report.cache_bytes(1)
    return (
        f"Maps between keys and values add {bytes_text(report.map_bytes)} to the weights: as much as the cache saves with its first "
        f"{-(-report.map_bytes // saved):,} tokens."
    )


def _trial(trial: loading.Trial) -> Table:
    """What the text said."""
    table = Table.grid(padding=(0, 2))
    before, after = trial.cache_bytes
    held = f", one tensor in {trial.bits} bits" if trial.bits else ""
    rows = {
        "text": f"{trial.tokens:,} tokens in the cache: {bytes_text(before)} before, {bytes_text(after)} after{held}, measured",
        "logits": f"moved by {trial.logit_error:.2g} of their size",
        "answer": f"the same {trial.same_tokens:,} of {trial.new_tokens:,} tokens, greedy",
    }
    for name, said in rows.items():
        table.add_row(Text(name, style=LABEL), said)
    return table
