"""Examples: what ``--help`` teaches by, and what the tests run from the same strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Example:
    """A command line as one would type it, the purpose it serves, and whether it takes at most a few seconds anywhere."""

    command: str
    purpose: str
    is_cheap: bool = False


def epilog(examples: Sequence[Example]) -> str:
    """The examples as the last part of a help page, in Rich markup."""
    lines = ["[bold]Examples[/bold]"]
    for example in examples:
        lines += ["", _escape(example.purpose), f"  [cyan]{_escape(example.command)}[/cyan]"]
    return "\n".join(lines)


def _escape(text: str) -> str:
    return text.replace("[", "\\[")
