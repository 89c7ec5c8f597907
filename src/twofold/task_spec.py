"""Which task, as plain values: what a run and a study keep of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """A task by name with its options (JSON values); the task's own file checks them."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
