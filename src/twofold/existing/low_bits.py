"""A halved model's one tensor in 8 or 4 bits."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from twofold.cache import QuantizedTiedLayer
from twofold.cache_spec import CacheSpec
from twofold.errors import TwofoldError
from twofold.existing.halving import is_halved
from twofold.existing.multi_head import window_tokens


class HalvedQuantizedLayer(QuantizedTiedLayer):
    """:class:`~twofold.cache.QuantizedTiedLayer` as a halved layer calls it: one stream, and values of no width."""

    _layer_type = "twofold_halved_quantized"

    def update(self, key_states: Tensor, value_states: Any = (), *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the stream [B, G, T, D]: all of it as it will be read, and values [B, G, S, 0]."""
        del value_states
        (stream,) = self.append((key_states,))
        return stream, stream[..., :0]


def quantized_cache(
    model: nn.Module,
    *,
    bits: int = 8,
    axis: Literal["token", "channel"] = "token",
    group_size: int = 32,
    tail_tokens: int = 128,
) -> DynamicCache:
    """A cache for a halved model whose halved layers hold their tensor in ``bits``, all but the last ``tail_tokens``; the others are as they were.

    A layer with a window is short, and holds its tensor as computed. Give the cache to ``generate`` or a forward pass as ``cache`` (``past_key_values`` in
    older releases); each text or batch needs one of its own. Raises TwofoldError for a model that is not halved or reads an encoder too, and for bits that
    there are not.
    """
    layers: list[Any] = [layer for layer in model.modules() if is_halved(layer)]
    if not layers:
        raise TwofoldError(f"This {type(model).__name__} is not halved: call twofold.halve(model) first.")
    spec = CacheSpec(bits=bits, axis=axis, group_size=group_size, tail_tokens=tail_tokens)
    if spec.axis == "head":
        raise TwofoldError(
            "Codes with one scale for a head are for models of Twofold's own: use axis='token' or 'channel'."
        )
    config: Any = model.config
    if config.is_encoder_decoder:
        raise TwofoldError(
            f"This {type(model).__name__} needs two caches, of the source and of the text, and this is one: leave the cache to it."
        )
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    for index in (layer.layer_idx for layer in layers if not window_tokens(layer)):
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
        cache.layers[index] = HalvedQuantizedLayer(spec)
    return cache
