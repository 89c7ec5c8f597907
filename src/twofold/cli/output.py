"""Where commands print: Rich for people, JSON for programs, both on stdout; progress and warnings on stderr."""

from __future__ import annotations

import json
import math
import sys
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text for people.")]


def show(*renderables: RenderableType) -> None:
    """Print for people: as wide as the terminal, without colour when piped."""
    console = Console(highlight=False, soft_wrap=False)
    for renderable in renderables:
        console.print(renderable)


def show_json(value: Any) -> None:
    """Print one JSON value over several lines."""
    sys.stdout.write(_text(value, indent=2) + "\n")


def show_json_line(value: Any) -> None:
    """Print one JSON value as one line, at once: whoever reads may be waiting for it."""
    sys.stdout.write(_text(value, indent=None) + "\n")
    sys.stdout.flush()


def _text(value: Any, *, indent: int | None) -> str:
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    """The value with null for every number that JSON cannot write (a perplexity may be infinite)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value
