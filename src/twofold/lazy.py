"""Modules that are imported when they are used: ``twofold explain`` must not wait for torch.

A file names what it needs twice, once for readers and type checkers and once for Python::

    if TYPE_CHECKING:
        from twofold.training import trainer
    else:
        trainer = Lazy("twofold.training.trainer")
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Lazy:
    """Stands for a module and imports it at the first attribute that is asked of it."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._module), name)

    def __repr__(self) -> str:
        return f"<{self._module}, imported when it is used>"
