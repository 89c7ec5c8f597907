"""One layer of a cache as attention sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor
from transformers.cache_utils import Cache

from twofold.cache.layer import StreamLayer
from twofold.cache.static import StaticTiedLayer
from twofold.errors import TwofoldError
from twofold.kernels.codes import Held
from twofold.rotations import Positions

Made = TypeVar("Made")


class LayerView:
    """``update(streams) -> streams``, some of them as codes, and where the queries and keys of that update stand."""

    def __init__(self, cache: Cache, layer_index: int) -> None:
        if layer_index >= len(cache.layers) or not isinstance(cache.layers[layer_index], StreamLayer):
            raise TwofoldError(
                f"A {type(cache).__name__} keeps keys and values apart and cannot hold tied streams: use twofold.cache.TiedCache(model.config.spec)."
            )
        self.cache = cache
        self.layer_index = layer_index
        self.layer: StreamLayer = cache.layers[layer_index]

    @property
    def tokens_seen(self) -> int | Tensor:
        """Tokens before those that the next update brings: the position of its first token. A tensor where looking would wait for the device."""
        return self.layer.next_position

    def update(self, streams: tuple[Tensor, ...]) -> tuple[Held, ...]:
        """Append the new tokens' streams [B, G, T, D]; all that they may see, [B, G, S, D], as floats or as codes."""
        # Through the cache and not straight to the layer: offloading happens there.
        first, others = self.cache.update(streams[0], streams[1:], self.layer_index)
        return (first, *others)

    def key_positions(self, num_keys: int) -> Positions:
        """The positions of the ``num_keys`` keys that the last update gave; negative where a slot is empty."""
        return self.layer.key_positions(num_keys)

    @property
    def max_tokens(self) -> int:
        """The most tokens that there will ever be; 0: not known."""
        return max(0, self.layer.get_max_length())

    def remember(self, name: str, make: Callable[[], Made]) -> Made:
        """What ``make`` gives, made once for as long as the layer lives if its room is pre-allocated: a compiled step then has it as an input."""
        if not isinstance(self.layer, StaticTiedLayer):
            return make()
        if name not in self.layer.memo:
            self.layer.memo[name] = make()
        made: Made = self.layer.memo[name]
        return made
