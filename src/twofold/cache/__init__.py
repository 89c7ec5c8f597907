"""The KV cache of tied layers inside Transformers: it holds the tie's basis streams, so one tensor where K and V are proportional.

:class:`TiedCache` is a model's worth of layers, a Transformers ``Cache`` that ``generate`` takes; how each layer holds its streams is a
:class:`~twofold.cache_spec.CacheSpec`: growing (:class:`TiedLayer`), pre-allocated (:class:`StaticTiedLayer`) or in few bits
(:class:`QuantizedTiedLayer`). Attention sees one layer of it, as a :class:`LayerView`.
"""

from __future__ import annotations

from twofold.cache.files import load_cache, save_cache
from twofold.cache.layer import LAYER_TYPE, StreamLayer, TiedLayer, storage_bytes
from twofold.cache.quantized import QuantizedTiedLayer
from twofold.cache.static import StaticTiedLayer
from twofold.cache.tied_cache import TiedCache
from twofold.cache.view import LayerView

__all__ = [
    "LAYER_TYPE",
    "LayerView",
    "QuantizedTiedLayer",
    "StaticTiedLayer",
    "StreamLayer",
    "TiedCache",
    "TiedLayer",
    "load_cache",
    "save_cache",
    "storage_bytes",
]
