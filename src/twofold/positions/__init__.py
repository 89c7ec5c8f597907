"""Where a token stands, told to attention: one file per scheme, each a frozen dataclass that knows its data, its cost and its tensor functions.

The specs that hold a scheme import no torch; a scheme's tensor functions do, when they are called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from twofold.errors import TwofoldError
from twofold.positions.learned import LearnedPositions
from twofold.positions.none import NoPositions
from twofold.positions.relative_bias import RelativeBiasPositions
from twofold.positions.rotary import RotaryPositions
from twofold.positions.scheme import PositionScheme
from twofold.positions.shared_rotary import SharedRotaryPositions

SCHEMES: Mapping[str, type[PositionScheme]] = {
    scheme.kind: scheme
    for scheme in (NoPositions, LearnedPositions, RotaryPositions, SharedRotaryPositions, RelativeBiasPositions)
}

__all__ = [
    "SCHEMES",
    "LearnedPositions",
    "NoPositions",
    "PositionScheme",
    "RelativeBiasPositions",
    "RotaryPositions",
    "SharedRotaryPositions",
    "positions_from_dict",
    "positions_to_dict",
]


def positions_from_dict(values: Mapping[str, Any]) -> PositionScheme:
    """A scheme from ``{"kind": ..., **fields}``. Raises TwofoldError for an unknown kind or field."""
    kind, options = str(values.get("kind")), {name: value for name, value in values.items() if name != "kind"}
    if kind not in SCHEMES:
        raise TwofoldError(f"Positions of kind {kind!r} are not known: use one of {', '.join(SCHEMES)}.")
    try:
        return SCHEMES[kind](**options)
    except TypeError as error:
        raise TwofoldError(f"Positions of kind {kind!r} do not fit: {error}.") from None


def positions_to_dict(positions: PositionScheme) -> dict[str, Any]:
    """The inverse of :func:`positions_from_dict`."""
    return {"kind": positions.kind} | asdict(positions)
