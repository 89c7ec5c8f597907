"""The cache of a whole model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from twofold.cache.layer import StreamLayer, TiedLayer, storage_bytes
from twofold.cache.quantized import QuantizedTiedLayer
from twofold.cache.static import StaticTiedLayer
from twofold.cache_spec import CacheSpec, specs_of_layers
from twofold.cost import quantized_streams
from twofold.errors import TwofoldError
from twofold.spec import AttentionSpec, ModelSpec

_GROWING = CacheSpec()  # a value of the module, which a compiled prompt may read


class TiedCache(DynamicCache):
    """One layer of streams per layer of the model, each held as its :class:`~twofold.cache_spec.CacheSpec` says.

    ``generate`` and the model make one by themselves; make it by hand to keep it between calls, to look at ``nbytes``, or to hold layers in
    different ways. Offloading needs an accelerator; without one the streams are in main memory anyway.

    >>> from twofold.presets import PRESETS
    >>> cache = TiedCache(PRESETS["tiny"], CacheSpec(max_tokens=128))
    >>> cache.get_max_length()
    128
    """

    def __init__(self, spec: ModelSpec, cache: CacheSpec | tuple[CacheSpec, ...] | None = None) -> None:
        cache = _GROWING if cache is None else cache
        self.spec = spec
        self.attention_specs = tuple(spec.attention(index) for index in range(spec.num_hidden_layers))
        self.cache_specs = specs_of_layers(spec.num_hidden_layers, cache)
        self.max_tokens = max([held.max_tokens for held in self.cache_specs])
        pairs = zip(self.attention_specs, self.cache_specs, strict=True)
        offloads = any(held.offload for held in self.cache_specs) and torch.accelerator.is_available()
        Cache.__init__(self, layers=[_layer(attention, held) for attention, held in pairs], offloading=offloads)

    def check_fits(self, specs: tuple[AttentionSpec, ...], num_tokens: int) -> None:
        """Raise TwofoldError if this is not a cache of a model with these layers, or has no room for ``num_tokens`` more."""
        if torch.compiler.is_compiling():
            return
        if self.attention_specs is not specs and self.attention_specs != specs:
            raise TwofoldError(_difference(self.attention_specs, specs))
        limited = [layer for layer in self.layers if layer.get_max_length() > 0]
        if limited:
            min(limited, key=lambda layer: layer.get_max_length()).check_room(num_tokens)

    @property
    def past_tokens(self) -> int | Tensor:
        """Tokens so far; a tensor of its own where looking at the number would wait for the device."""
        seen = [layer.next_position for layer in self.layers]
        return next((number.clone() for number in seen if isinstance(number, Tensor)), seen[0])

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """:meth:`StreamLayer.crop` of every layer, or of none: where one refuses, the others still hold what they held."""
        for layer in self.layers:
            layer.check_crop(int(tokens_to_remove))
        super().crop(tokens_to_remove)

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that all layers occupy; equals ``cost.cache_bytes``, until :meth:`crop` leaves a window less than full."""
        return storage_bytes(tensor for layer in self.layers for tensor in layer.tensors)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """The streams, layer by layer."""
        return (layer.streams for layer in self.layers)


def _layer(attention: AttentionSpec, cache: CacheSpec) -> StreamLayer:
    num_coded = len(quantized_streams(attention, cache)) if cache.axis == "head" else 0
    if cache.max_tokens:
        _check_positions(attention, cache.max_tokens)
        return StaticTiedLayer(cache.max_tokens, attention.window_tokens, num_coded)
    if cache.quantizes(attention.window_tokens) and not num_coded:
        return QuantizedTiedLayer(cache)
    return TiedLayer(attention.window_tokens, num_coded)


def _check_positions(attention: AttentionSpec, max_tokens: int) -> None:
    length = attention.positions.max_positions
    if length and max_tokens > length:
        raise TwofoldError(
            f"A cache with room for {max_tokens} tokens goes beyond the {length} positions that this model has learned: ask for at most {length}."
        )


def _difference(held: tuple[AttentionSpec, ...], wanted: tuple[AttentionSpec, ...]) -> str:
    """In which respect a cache is of another model."""
    if len(held) != len(wanted):
        return f"The cache is of a model of {len(held)} layers, and this model has {len(wanted)}: make one with TiedCache(model.config.spec)."
    layer, ours, theirs = next((index, a, b) for index, (a, b) in enumerate(zip(held, wanted, strict=True)) if a != b)
    name = next(name for name in ours.__dataclass_fields__ if getattr(ours, name) != getattr(theirs, name))
    return (
        f"The cache is of another model: in layer {layer} its {name} is {getattr(ours, name)}, and this model's is {getattr(theirs, name)}; "
        "make one with TiedCache(model.config.spec)."
    )
