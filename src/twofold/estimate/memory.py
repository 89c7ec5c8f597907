"""Amounts of memory as people write them: ``24GiB`` is 24 · 2³⁰ bytes, ``24GB`` is 24 · 10⁹."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType

from twofold.errors import TwofoldError

UNITS: Mapping[str, int] = MappingProxyType(
    {"B": 1}
    | {f"{letter}B": 1000**power for power, letter in enumerate("KMGTP", start=1)}
    | {f"{letter}iB": 1024**power for power, letter in enumerate("KMGTP", start=1)}
)
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*")


def read_memory(text: str) -> int:
    """Bytes, a part of a byte dropped. Raises TwofoldError for what is no amount, has no unit or an ambiguous one, or is nothing.

    >>> read_memory("24GiB"), read_memory("24 gb"), read_memory("1.5 KiB")
    (25769803776, 24000000000, 1536)
    """
    match = _AMOUNT.fullmatch(text)
    units = {name.lower(): size for name, size in UNITS.items()}
    size = units.get(match[2].lower()) if match else None
    if match is None or size is None:
        raise TwofoldError(
            f"{text!r} is no amount of memory: write a number and a unit, such as 24GiB (2^30 bytes each) or 24GB (10^9)."
        )
    amount = int(Fraction(match[1]) * size)
    if not amount:
        raise TwofoldError(f"{text!r} is no memory at all: write an amount such as 24GiB.")
    return amount
