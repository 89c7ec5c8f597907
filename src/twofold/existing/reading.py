"""One tensor in a cache that was made for two, and attention that reads it.

Transformers' caches hold what ``update(keys, values)`` is given. A halved layer gives them one stream as keys, and values of no width, [B, H, T, 0]: so
every cache that there is, growing, pre-allocated, offloaded or of somebody's own, holds one tensor through all that is done to it, and nothing of
Transformers is replaced.

Shapes: B batch, T new tokens, S keys, H query heads, G KV heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from twofold.errors import TwofoldError
from twofold.existing.key_rotations import KeyRotations, key_positions
from twofold.kernels import Inputs, Mask, Rotation, attend, choose
from twofold.models.attention_interface import mask_and_bias

IMPLEMENTATIONS = ("eager", "sdpa", "twofold")
"""Values of ``attn_implementation`` whose masks a halved layer understands."""

MAX_QUERIES_FOLDED = 16
"""Up to so many new tokens plain matrix products are faster than PyTorch's fused call, which is made for as many queries as keys."""


@dataclass(frozen=True)
class Held:
    """All that a query may read: the stream [B, G, S, D], how its keys turn, whether it holds the new tokens and no others, and how many it held before."""

    stream: Tensor
    rotation: Rotation | None
    is_new: bool
    seen: int | Tensor = 0


def cache_of(arguments: dict[str, Any]) -> Any:
    """The cache among a layer's arguments, under any of the names that it has had; None: there is none."""
    given = (arguments.get(name) for name in ("cache", "past_key_values", "layer_past"))
    return next((cache for cache in given if cache is not None), None)


def check_is_here(weight: Tensor) -> None:
    """Raise TwofoldError for a weight that came to be offloaded after its layer was halved: no hook brings it for what reads it here."""
    if weight.is_meta:
        raise TwofoldError(
            "The weights of a halved layer have been offloaded since: call twofold.restore(model), or keep all of it on devices."
        )


def check_halved(cache: Any, layer_index: int) -> None:
    """Raise TwofoldError for a cache that this layer filled with keys and values before it was halved, or that must have both, in few bits or in pages."""
    layers = getattr(cache, "layers", ())
    layer = layers[layer_index] if layer_index < len(layers) else None
    if hasattr(layer, "_quantize") or not hasattr(cache, "get_seq_length"):
        holder = layer if hasattr(layer, "_quantize") else cache
        raise TwofoldError(
            f"A halved layer's one tensor is not held by a {type(holder).__name__}: call generate with an ordinary cache, or with "
            "twofold.existing.low_bits.quantized_cache(model)."
        )
    values = getattr(layer, "__dict__", {}).get("values")
    if isinstance(values, Tensor) and values.shape[-1]:
        raise TwofoldError(
            "This cache holds keys and values apart, as before the model was halved: read the text again with a new cache."
        )


def append(cache: Any, stream: Tensor, layer_index: int) -> tuple[Tensor, int | Tensor]:
    """Hold the stream [B, G, T, D] of T more tokens: the stream of all, and how many there were before."""
    check_halved(cache, layer_index)
    seen = cache.get_seq_length(layer_index)
    if isinstance(seen, Tensor):
        seen = seen.clone()  # which appending counts up
    every, _ = cache.update(stream, stream[..., :0], layer_index)
    return every, seen


def read(
    layer: Any,
    streams: tuple[Tensor, Tensor],
    seen: int | Tensor,
    rotations: KeyRotations | None,
    own: Rotation | None,
    given: tuple[Tensor | None, Tensor | None],
) -> Held:
    """``streams``, of the new tokens and of all, with the turning of all keys; ``own`` is that of the new ones.

    ``given`` are the positions [B or 1, T] and the mask [B, 1, T, S] that the layer was given.
    """
    position_ids, attention_mask = given
    stream, every = streams
    num_new, num_keys = stream.shape[2], every.shape[2]
    is_new = num_keys == num_new and isinstance(seen, int) and seen == 0
    if rotations is None or is_new:
        return Held(every, own, is_new, seen)
    if position_ids is None:
        raise TwofoldError(
            f"{type(layer).__name__} was given a cache and no position_ids, without which no key can be turned."
        )
    positions = key_positions(num_keys, seen + num_new, position_ids, attention_mask)
    return Held(every, rotations.at(positions, stream), is_new, seen)


@dataclass(frozen=True)
class Reader:
    """Attention of a layer that others wrote; ``bias`` [1 or B, H, T, S] is added to its logits.

    Raises TwofoldError for a layer in training, and for an implementation whose masks it does not understand.
    """

    layer: nn.Module
    attention_mask: Tensor | None
    arguments: dict[str, Any]
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self.layer.training:
            raise TwofoldError(
                "A halved layer serves inference, and this one is in training: call model.eval(), or twofold.restore(model) to train it."
            )
        if self.implementation not in IMPLEMENTATIONS:
            raise TwofoldError(
                f"A halved layer does not understand the masks of attn_implementation={self.implementation!r}: use {' or '.join(IMPLEMENTATIONS)}."
            )

    @property
    def implementation(self) -> str:
        """Transformers' name of what makes the masks."""
        config: Any = self.layer.config
        return str(config._attn_implementation)

    def mask(self, query: Tensor, num_keys: int) -> tuple[Mask, Tensor | None]:
        """The mask in words, and what is added to the logits."""
        num_queries, is_causal = query.shape[2], self.arguments.get("is_causal")
        if is_causal is None:
            is_causal = getattr(self.layer, "is_causal", True)
        is_causal = bool(is_causal) and num_queries > 1
        if self.attention_mask is None and is_causal and num_queries < num_keys:
            # A prompt in a cache with room for more: no mask means here, as it does to PyTorch, that the queries are those of the first keys.
            return Mask(causal=True, positions=_first(num_queries, num_keys, query)), self.bias
        said, bias = mask_and_bias(self.attention_mask, self.bias, query, is_causal=is_causal)
        if num_queries > num_keys:  # a long text attends to a short source: its tokens are not the last of that
            said = replace(said, positions=_first(num_queries, num_keys, query))
        return said, bias

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotation: Rotation | None,
        *,
        key_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, H, T, D], keys and values [B, G, S, D] -> the output [B, H, T, D], and with eager attention the weights [B, H, T, S]."""
        query = query.to(key.dtype)  # under autocast a query that has turned has the dtype of the rotation
        mask, bias = self.mask(query, key.shape[2])
        weights: list[Tensor] | None = [] if self.implementation == "eager" else None
        scaling: Any = self.layer.scaling
        inputs = Inputs(
            query=query,
            key=key,
            value=value,
            mask=mask,
            scale=scaling,
            bias=bias,
            key_scale=key_scale,
            key_rotation=rotation,
            weights=weights,
        )
        by_pytorch = choose(inputs.problem).name == "sdpa"
        output = attend(inputs, "folded" if by_pytorch and query.shape[2] <= MAX_QUERIES_FOLDED else "auto")
        return output, weights[0] if weights else None


def _first(num_queries: int, num_keys: int, query: Tensor) -> tuple[Tensor, Tensor]:
    """Places of queries and of keys, both counted from the first."""
    slots = torch.arange(max(num_queries, num_keys), device=query.device)
    return slots[:num_queries], slots[:num_keys]
