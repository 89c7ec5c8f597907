"""Caches of any length without reading a text of that length: random streams, of the shapes and dtype that a model would bring, are appended to the real cache.

How long a cache is depends on no weight, and a prompt of 32,768 tokens would take minutes to read; to append as many takes a second.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twofold.cache import LayerView, TiedCache
from twofold.cost import cached_streams

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def drawn_streams(
    cache: TiedCache, layer_index: int, tokens: int, like: Tensor, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Streams [B, G, T, D] of one layer, one row of the batch drawn for all; ``like`` is any tensor with B first, of their dtype and device."""
    drawn = [
        torch.randn((1, heads, tokens, dim), dtype=like.dtype, device=like.device, generator=generator)
        for heads, dim in cached_streams(cache.attention_specs[layer_index])
    ]
    return tuple(stream.expand(len(like), -1, -1, -1) for stream in drawn)


@torch.no_grad()
def fill(cache: TiedCache, tokens: int, like: Tensor, *, chunk: int = 4096) -> None:
    """Append until the cache has seen ``tokens`` tokens, at most ``chunk`` at a time, as the layers' attention would: one layer after another."""
    generator = torch.Generator(like.device).manual_seed(0)
    while (missing := tokens - int(cache.get_seq_length())) > 0:
        for index in range(len(cache.layers)):
            LayerView(cache, index).update(drawn_streams(cache, index, min(missing, chunk), like, generator))
