"""How a layer's cache holds its streams, as plain values: growing or pre-allocated, as computed or quantized, on the device or off it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from twofold.errors import TwofoldError

Axis = Literal["token", "channel", "head"]
BITS = (4, 8)


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """One layer's cache.

    ``max_tokens`` N > 0: room for N tokens is taken at once and never moves; 0: it grows. ``bits``: 8 or 4 per float instead of the model's
    dtype; 0: as computed. Then ``axis`` says what shares a scale and a zero point: ``group_size`` floats of one token ("token"; a head
    with fewer floats is one group), or one channel of ``group_size`` successive tokens ("channel"); and the last ``tail_tokens`` stay as computed.
    Or all floats of a token's head share a scale alone ("head", with 8 bits, no tail and no ``group_size``): then kernels read the codes as they are
    held, growing or pre-allocated, where all others are made floats at every step. ``offload``: the streams wait in main memory while other layers compute.

    A layer with a window is never quantized: it is short, and what is old in it is forgotten anyway.
    """

    max_tokens: int = 0
    bits: int = 0
    axis: Axis = "token"
    group_size: int = 32
    tail_tokens: int = 0
    offload: bool = False

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 0), ("group_size", 1), ("tail_tokens", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise TwofoldError(f"A cache's {name} is {value!r}, but must be a whole number of at least {least}.")
        if self.bits not in (0, *BITS):
            raise TwofoldError(
                f"A cache of {self.bits!r} bits cannot be had: use 8 or 4, or 0 for the model's own dtype."
            )
        if self.axis not in get_args(Axis):
            raise TwofoldError(f"A cache's axis is {self.axis!r}, but must be one of {', '.join(get_args(Axis))}.")
        if self.axis == "head":
            self._check_codes()
        elif self.bits and self.max_tokens:
            raise TwofoldError("A quantized cache grows: leave max_tokens out, or bits, or say axis='head'.")

    def _check_codes(self) -> None:
        if self.bits != 8:
            raise TwofoldError(
                f"A cache with axis='head' holds codes of 8 bits, and {self.bits} were asked for: say bits=8, or another axis."
            )
        if self.tail_tokens:
            raise TwofoldError(
                "Kernels read codes alone, so a cache with axis='head' keeps no tail as computed: leave tail_tokens out."
            )
        if self.group_size != CacheSpec.group_size:
            raise TwofoldError("With axis='head' the group is the head: leave group_size out.")

    def quantizes(self, window_tokens: int) -> bool:
        """Whether a layer with this window (0: none) is quantized."""
        return bool(self.bits) and not window_tokens

    def holds_codes(self, window_tokens: int) -> bool:
        """Whether kernels read such a layer's codes as they are held."""
        return self.axis == "head" and self.quantizes(window_tokens)

    def group(self, dim: int) -> int:
        """Floats of a token that share a scale, of ``dim``. Raises TwofoldError where ``dim`` does not split into such groups and whole bytes."""
        group = min(self.group_size, dim) if self.axis == "token" else dim
        if dim % group or dim * self.bits % 8:
            raise TwofoldError(
                f"{dim} floats of a head do not split into groups of {self.group_size} and whole bytes of {self.bits} bits: choose another group_size."
            )
        return group

    def quantized_tokens(self, tokens: int) -> int:
        """How many of ``tokens`` are quantized: all but the tail, in whole groups where the groups are of tokens."""
        old = max(0, tokens - self.tail_tokens)
        return old - old % self.group_size if self.axis == "channel" else old

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``CacheSpec(**fields)`` gives the same back."""
        return asdict(self)


def specs_of_layers(num_layers: int, cache: CacheSpec | tuple[CacheSpec, ...]) -> tuple[CacheSpec, ...]:
    """One for each layer. Raises TwofoldError where there are neither one nor as many as layers."""
    specs = (cache,) * num_layers if isinstance(cache, CacheSpec) else tuple(cache)
    if len(specs) != num_layers:
        raise TwofoldError(
            f"{len(specs)} caches were described for a model of {num_layers} layers: describe one, or one for each layer."
        )
    return specs
