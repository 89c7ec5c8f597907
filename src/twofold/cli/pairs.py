"""``name=value`` on the command line: how options reach what has no option of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from twofold.errors import TwofoldError


def read_pairs(pairs: Sequence[str] | None, option: str) -> dict[str, Any]:
    """``["context=64", "path=notes.txt"]`` as ``{"context": 64, "path": "notes.txt"}``: a value is JSON where it can be read as JSON, else text.

    Raises TwofoldError, naming ``option``, for a pair without a name, without ``=``, or given twice.
    """
    values: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise TwofoldError(
                f"{option} {pair!r} is not of the form name=value: write, for example, {option} context=64."
            )
        if name in values:
            raise TwofoldError(f"{option} gives {name} twice: keep one of the two.")
        values[name] = _value(text)
    return values


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
