"""Where commands print: Rich for people, JSON for programs, both on stdout; progress and warnings on stderr."""

from __future__ import annotations

import json
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


def show_json(value: Any, *, indent: int | None = 2) -> None:
    """Print one JSON value; with ``indent=None`` as one line."""
    sys.stdout.write(json.dumps(value, indent=indent, ensure_ascii=False) + "\n")
