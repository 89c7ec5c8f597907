"""A task's options: a frozen dataclass of JSON values, every one with a default, checked when it is made."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from twofold.errors import TwofoldError

OptionsType = TypeVar("OptionsType", bound="Options")
_WORDS: Mapping[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Checks that every value is of its default's type; a subclass goes on to say what else must hold."""

    def __post_init__(self) -> None:
        for field in fields(self):
            wanted, value = type(field.default), getattr(self, field.name)
            if wanted is float and type(value) is int:
                object.__setattr__(self, field.name, float(value))
            elif type(value) is not wanted:
                raise TwofoldError(f"The option {field.name} is {value!r}, but it must be {_WORDS[wanted]}.")
            if wanted is float and not math.isfinite(value):
                raise TwofoldError(f"The option {field.name} is {value!r}, but it must be a finite number.")

    def require(self, name: str, holds: bool, wanted: str) -> None:
        """Raise TwofoldError, saying that option ``name`` must be ``wanted``, unless that holds."""
        if not holds:
            raise TwofoldError(f"The option {name} is {getattr(self, name)!r}, but it must be {wanted}.")

    def require_at_least(self, least: int, *names: str) -> None:
        """Raise TwofoldError for the first of ``names`` that is less than ``least``."""
        for name in names:
            self.require(name, getattr(self, name) >= least, f"at least {least}")

    def require_seed(self, name: str = "data_seed") -> None:
        """Raise TwofoldError unless the option is a seed."""
        self.require(name, 0 <= getattr(self, name) < 2**32, "from 0 up to 4294967295")


def read_options(kind: type[OptionsType], values: Mapping[str, Any], task: str) -> OptionsType:
    """Options of one task from a mapping. Raises TwofoldError for one that is unknown, of the wrong type or out of range."""
    known = [field.name for field in fields(kind)]
    for name in values:
        if name not in known:
            raise TwofoldError(
                f"The task {task} has no option {name!r}{near_miss(str(name), known)}; its options are {', '.join(known)}."
            )
    try:
        return kind(**values)
    except TwofoldError as error:
        raise TwofoldError(f"Task {task}: {error}") from None


def near_miss(name: str, known: list[str]) -> str:
    """`` (did you mean 'length'?)``, or nothing where no known name is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
