"""Libraries of the extra ``data``: asked for when a task needs one, so that the other tasks need none of them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from twofold.errors import TwofoldError

DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow"}
"""Import name -> name in the package index, where the two differ."""


def data_library(module: str, purpose: str) -> Any:
    """The module, imported now. Raises TwofoldError with the command that installs it; ``purpose`` ends "... is needed to"."""
    try:
        return import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != top:
            raise
        raise TwofoldError(
            f'{DISTRIBUTIONS.get(top, top)} is needed to {purpose}, and is not installed: pip install "twofold[data]".'
        ) from None
