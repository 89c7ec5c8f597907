"""Libraries of the extra ``onnx``: asked for when a file is written or run, so that nothing else needs them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from twofold.errors import TwofoldError


def onnx_library(module: str, purpose: str) -> Any:
    """The module, imported now. Raises TwofoldError with the command that installs it; ``purpose`` ends "... is needed to"."""
    try:
        return import_module(module)
    except ImportError as error:
        if (error.name or "").partition(".")[0] != module:
            raise
        raise TwofoldError(
            f'{module} is needed to {purpose}, and is not installed: pip install "twofold[onnx]".'
        ) from None
