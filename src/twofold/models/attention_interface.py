"""``attn_implementation="twofold"``: our kernels under Transformers' models, and Transformers' names for the kernels under ours.

Transformers asks two registries for an implementation's name: ``AttentionInterface`` for the function that attends, ``AttentionMaskInterface`` for
the function that makes its mask. A name that only the first one knows gets no mask at all, without a word: :func:`register` therefore fills both.

Shapes: B batch, T queries, S keys, H query heads, G KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from twofold.errors import TwofoldError
from twofold.kernels import Inputs, Mask, attend

NAME = "twofold"
"""Our own name in both registries."""

BACKENDS_BY_IMPLEMENTATION: Mapping[str, str] = MappingProxyType({NAME: "auto", "eager": "reference", "sdpa": "sdpa"})
"""What ``attn_implementation`` means for our own models: the name of a kernel (see :mod:`twofold.kernels`)."""

# What Transformers' models hand to every attention function and what changes nothing here: it is in the mask already, or is not for attention.
_WITHOUT_EFFECT = frozenset(
    {
        *(
            "cache",
            "cache_position",
            "past_key_values",
            "use_cache",
            "position_ids",
            "position_embeddings",
            "sliding_window",
        ),
        *(
            "max_length_q",
            "max_length_k",
            "labels",
            "num_items_in_batch",
            "output_hidden_states",
            "output_router_logits",
        ),
        "return_dict",
    }
)


class ImplementationError(TwofoldError, ValueError):
    """An ``attn_implementation`` that our models do not have; a ValueError, as Transformers raises for those that it does not know."""


def backend_of(implementation: str | None) -> str:
    """The kernel that one of our models uses under Transformers' name; None, that nothing was said, is our own choice.

    Raises ImplementationError for a name that is not in :data:`BACKENDS_BY_IMPLEMENTATION`.
    """
    name = NAME if implementation is None else implementation
    if name not in BACKENDS_BY_IMPLEMENTATION:
        raise ImplementationError(
            f'Specified `attn_implementation="{name}"` is not supported by Twofold models: use one of {", ".join(BACKENDS_BY_IMPLEMENTATION)}.'
        )
    return BACKENDS_BY_IMPLEMENTATION[name]


def register() -> None:
    """Make ``attn_implementation="twofold"`` known to Transformers, mask and all."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def mask(*, q_length: int, kv_length: int, allow_is_causal_skip: bool = True, **arguments: Any) -> Tensor | None:
    """Which keys a query may see, [B, 1, T, S], True where it may; None where that is said by one word, causal or not.

    The arguments are those that Transformers gives to every mask function. Of T > 1 queries and S > T keys it is always said in full: which
    of the keys the queries belong to depends on the cache.
    """
    allow_is_causal_skip = allow_is_causal_skip and q_length in (1, kv_length)
    return sdpa_mask(q_length=q_length, kv_length=kv_length, allow_is_causal_skip=allow_is_causal_skip, **arguments)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """A layer of another model through :func:`twofold.kernels.attend`: [B, H, T, D] and [B, G, S, D] -> [B, T, H, D].

    ``attention_mask`` is None, True where a key may be seen, or added to the logits. ``options`` are scaling, is_causal, position_bias (added to
    the logits), and dropout, which must be 0. Raises TwofoldError for an option that changes attention in a way that no kernel of ours computes.
    """
    scaling, is_causal = options.pop("scaling", None), options.pop("is_causal", None)
    bias = options.pop("position_bias", None)
    _refuse(module, options)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    num_queries, num_values = query.shape[2], value.shape[3]
    said, bias = mask_and_bias(attention_mask, bias, query, is_causal=is_causal)
    if num_values < key.shape[3]:  # kernels read keys and values of one length; what the zeros give is cut off again
        value = F.pad(value, (0, key.shape[3] - num_values))
    if said.causal and num_queries == 1:
        said = Mask(causal=False)
    output = attend(
        Inputs(
            query=query,
            key=key,
            value=value,
            mask=said,
            scale=query.shape[3] ** -0.5 if scaling is None else float(scaling),
            bias=bias,
        )
    )
    return output[..., :num_values].transpose(1, 2).contiguous(), None


def mask_and_bias(
    attention_mask: Tensor | None, bias: Tensor | None, query: Tensor, *, is_causal: bool
) -> tuple[Mask, Tensor | None]:
    """The mask in words, and what is added to the logits."""
    if attention_mask is None:
        return Mask(causal=is_causal), bias
    # A number and not -inf, as in Transformers: a query that sees nothing (padding) then gives numbers, and not NaN. Half of the lowest, to which logits of
    # float16 can be added.
    lowest = torch.finfo(query.dtype).min / 2
    if attention_mask.dtype != torch.bool:
        added = attention_mask if bias is None else attention_mask + bias
        return Mask(causal=False), added.to(query.dtype).clamp(min=lowest)
    if query.shape[2] == 1 and attention_mask.shape[1] == 1:
        key_mask = attention_mask[:, 0, 0].expand(query.shape[0], -1)
        return Mask(causal=False, key_mask=key_mask), bias
    hidden = torch.zeros_like(attention_mask, dtype=query.dtype) if bias is None else bias
    return Mask(causal=False), torch.where(attention_mask, hidden, lowest)


def _refuse(module: nn.Module, options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name in _WITHOUT_EFFECT or value is None or value is False or (name == "dropout" and value == 0):
            continue
        what = f"dropout of {value}" if name == "dropout" else repr(name)
        raise TwofoldError(
            f"{type(module).__name__} asks for attention with {what}, which no kernel of Twofold computes: "
            "use attn_implementation='eager' for this model."
        )
