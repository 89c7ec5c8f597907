"""The ways to hold the cache of a model that others made: as Transformers stores it, and what a tie would store with the same heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from twofold.errors import TwofoldError
from twofold.estimate.fields import expanded
from twofold.estimate.layers import LayerCache

STORED = "as stored"
EXACT = "one tensor where K=V"
TIED = "(Q, K=V)"
LATENT = "latent"
EXPANDED = "K, V of all heads"

Ways = list[tuple[str, tuple[LayerCache, ...]]]


def ways_of(layers: Sequence[LayerCache], read: Sequence[LayerCache], fields: Mapping[str, Any]) -> Ways:
    """What is stored first; then, where they differ from it, the ways that the model's own layers offer.

    ``layers`` is what the cache holds, ``read`` what the configuration says. MLA's latent is shown beside the keys and values of all heads
    that it stands for, whichever is stored; it is one tensor for all of them already, so no tie is shown. Elsewhere: one tensor in the layers
    whose keys and values follow from one projection (exact: the keys are turned when they are read), and one in every layer (another model,
    with the same heads and the tie K=V).
    """
    ways: Ways = [(STORED, tuple(layers))]
    try:
        all_heads = expanded(fields, read)
    except TwofoldError:
        all_heads = ()
    if all_heads:
        ways += [(LATENT, tuple(read)), (EXPANDED, all_heads)]
    else:
        ways += [
            (EXACT, tuple(layer.as_one() if layer.is_one else layer for layer in layers)),
            (TIED, tuple(layer.as_one() for layer in layers)),
        ]
    distinct: Ways = []
    for name, way in ways:
        if _tensors(way) not in [_tensors(other) for _, other in distinct]:
            distinct.append((name, way))
    return distinct


def _tensors(layers: Sequence[LayerCache]) -> list[list[tuple[int, int, str, int]]]:
    """What is held, whatever it is called."""
    return [sorted((t.heads, t.dim, t.kept, t.size) for t in layer.tensors) for layer in layers]
