"""Rotary positions: full, partial, proportional; keys turned on reading, or the cached stream itself turned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from twofold.errors import TwofoldError
from twofold.positions.scheme import PositionScheme

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RotaryPositions(PositionScheme):
    """A pair (a, b) of dimensions at position p turns to (a cos pω - b sin pω, b cos pω + a sin pω).

    With n = ``fraction`` · D dimensions that turn (1.0: all), pair i of n / 2 has ω = theta^(-2i / n) and consists of dimensions i and
    i + n / 2; ``proportional``, as in Gemma 4, keeps the frequencies and pairs of a full rotation, theta^(-2i / D) and i + D / 2, and turns only
    the first n / 2 pairs.

    ``rotate`` says what is cached where V = cK. ``read``: the stream as it is; keys are turned when they are read, values never.
    ``stream``: the turned stream is key and value, and the head's output is turned back at the query's position, so a value is seen
    turned by its distance. Both keep one tensor; they are different functions (see the page "Rotary positions and K=V").

    Source: Su et al. 2021 (2104.09864), equation 34; ``stream``: DeepSeek-V4.
    """

    kind: ClassVar[str] = "rotary"

    theta: float = 10000.0
    fraction: float = 1.0
    proportional: bool = False
    rotate: Literal["read", "stream"] = "read"

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise TwofoldError(
                f"fraction is {self.fraction}, but it is the part of a head that turns: use 0 < fraction <= 1."
            )
        if not self.theta > 0:
            raise TwofoldError(f"theta is {self.theta}, but rotary frequencies are powers of a positive number.")
        if self.rotate not in ("read", "stream"):
            raise TwofoldError(f"rotate is {self.rotate!r}, but keys are turned on 'read' or the 'stream' is turned.")

    @property
    def turns_stream(self) -> bool:
        """Whether ``rotate`` is stream."""
        return self.rotate == "stream"

    def without_tie(self) -> Self:
        """Keys that are turned when they are read: only a key that is the value can turn with it."""
        return replace(self, rotate="read")

    def check(self, *, head_dim: int, value_over_key: Fraction | None) -> None:
        """The number of dimensions that turn must be even, and only a stream that is key and value can be turned as one."""
        turning = self.fraction * head_dim
        if turning != round(turning) or round(turning) % 2:
            raise TwofoldError(
                f"Rotary positions turn pairs: {self.fraction} of head_dim {head_dim} is {turning:g} dimensions, and it must be an even number."
            )
        if self.proportional and head_dim % 2:
            raise TwofoldError(
                f"Proportional rotary positions pair the halves of a head: head_dim {head_dim} must be even."
            )
        if self.turns_stream and value_over_key is None:
            raise TwofoldError(
                "rotate='stream' turns a stream that is key and value, which needs V = K up to a factor: use rotate='read'."
            )

    def angles(self, positions: Tensor, *, head_dim: int) -> tuple[Tensor, int]:
        """Angles [S, n / 2] in float64, and the distance of a pair."""
        turning = round(self.fraction * head_dim)
        base = head_dim if self.proportional else turning
        return rotary_angles(positions, theta=self.theta, pairs=turning // 2, base=base), base // 2


def rotary_angles(positions: Tensor, *, theta: float, pairs: int, base: int) -> Tensor:
    """p · theta^(-2i / base) for every position p [S] and pair i < ``pairs``: [S, pairs] in float64, since p may be large."""
    # Methods of the tensor and no function of torch, which a compiler could not follow to where it is imported.
    index = positions.new_ones(pairs).cumsum(dim=0).double() - 1
    return positions.double()[:, None] * theta ** (-2.0 * index / base)
