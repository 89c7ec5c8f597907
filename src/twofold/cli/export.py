"""``twofold export``: a trained decoder as an ONNX file, for machines without PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from twofold.cli.examples import Example
from twofold.cli.fitting import computing_on
from twofold.cli.output import Json, show, show_json
from twofold.cli.run_folder import RUN_FILE, model_folder
from twofold.lazy import Lazy

if TYPE_CHECKING:
    from twofold import export, models
else:
    export, models = Lazy("twofold.export"), Lazy("twofold.models")

EXAMPLES = (
    Example(
        command="twofold export runs/notes onnx/notes",
        purpose="The model of a run as onnx/notes/model.onnx, tried before it is written.",
    ),
    Example(
        command="twofold export runs/notes onnx/half --dtype fp16 --max-tokens 4096",
        purpose="Half the bytes, for weights and cache; rotary tables for shorter texts.",
    ),
    Example(
        command="twofold export runs/notes onnx/notes --json | jq .cache_bytes_per_token",
        purpose="For programs.",
    ),
)


def command(
    model: Annotated[Path, typer.Argument(help="A folder that `twofold train` or save_pretrained wrote.")],
    folder: Annotated[Path, typer.Argument(help="Where the file goes; made where it is not there.")],
    *,
    dtype: Annotated[
        str, typer.Option(help="Type of the weights and of the cache.", autocompletion=lambda: ["fp32", "fp16"])
    ] = "fp32",
    max_tokens: Annotated[
        int | None, typer.Option(help="The longest text.", metavar="N", min=1, show_default="32768")
    ] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set.", metavar="N", show_default="20")] = None,
    as_json: Json = False,
) -> None:
    """Write a decoder as an ONNX file with one cache input and output for each cached tensor of its ties."""
    options = {name: value for name, value in (("max_tokens", max_tokens), ("opset", opset)) if value is not None}
    place = model_folder(model) if (model / RUN_FILE).is_file() else model
    with computing_on("cpu"), Console(stderr=True).status("Tracing the model, then trying the file"):
        written = export.export_onnx(models.load_model(place), folder, dtype=dtype, **options)
    if as_json:
        show_json(written.to_dict())
    else:
        show(_table(written))


def _table(written: export.OnnxExport) -> Table:
    """What was written, in a few lines."""
    table = Table.grid(padding=(0, 2))
    rows = {
        "tie": written.tie,
        "cache": f"{written.cache_bytes_per_token:,} bytes per token ({written.dtype}), {written.cached_tensors} tensors",
        "texts": f"up to {written.max_tokens:,} tokens",
        "tried": f"logits differ from the model's by {written.largest_difference:.0e} of the largest",
        "files": "\n".join(f"{written.folder / name}  {size:,} bytes" for name, size in written.files.items()),
    }
    for name, text in rows.items():
        table.add_row(Text(name, style="bold cyan"), Text(text, overflow="fold"))
    return table
