"""What one layer of any model keeps in its cache, tensor by tensor, and what it would keep as one tensor.

A :class:`CachedTensor` is so many heads of so many floats for each token that it keeps; a :class:`LayerCache` is the tensors of a layer.
They know no engine: :mod:`twofold.estimate.fields` makes them of a configuration, :mod:`twofold.estimate.engine` of a running cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import Literal

from twofold.cache_spec import CacheSpec
from twofold.cost import quantized_bytes

Kept = Literal["all", "window", "compressed", "unfinished", "last block"]
MAX_GROUP = 32


@dataclass(frozen=True, kw_only=True)
class CachedTensor:
    """``heads`` × ``dim`` floats for each token that is kept.

    ``kept`` says which: all; the last ``size`` ("window"); one entry for each ``size`` tokens ("compressed"); the tokens that do not make up
    such an entry yet ("unfinished": from 1 to ``size``, because the last entry's tokens are let go when the next one comes); the ``size``
    tokens of the last entry ("last block"). ``float_bytes`` 0: the dtype's; otherwise the tensor has a width of its own.
    """

    name: str
    heads: int
    dim: int
    kept: Kept = "all"
    size: int = 0
    float_bytes: int = 0

    def tokens(self, tokens: int) -> int:
        """Entries that are kept of ``tokens`` tokens, the last of which came alone."""
        if self.kept == "window":
            return min(tokens, self.size)
        if self.kept == "compressed":
            return tokens // self.size
        if self.kept == "unfinished":
            return tokens % self.size or min(tokens, self.size)
        if self.kept == "last block":
            return self.size if tokens >= self.size else 0
        return tokens

    def nbytes(self, tokens: int, width: int, cache: CacheSpec) -> int:
        """Bytes for one sequence, floats of the dtype having ``width`` bytes. Only what keeps all tokens is quantized."""
        entries = self.tokens(tokens)
        if not cache.bits or self.kept != "all":
            return entries * self.heads * self.dim * (self.float_bytes or width)
        old = cache.quantized_tokens(entries)
        return self.heads * (quantized_bytes(self.dim, old, width, cache) + (entries - old) * self.dim * width)


@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """The tensors of one layer, and ``state_bytes`` of a state (of a recurrence, a convolution) that does not grow with the text.

    ``is_one``: keys and values follow from one tensor without loss, whether or not the engine keeps it once.
    """

    tensors: tuple[CachedTensor, ...] = ()
    state_bytes: int = 0
    is_one: bool = False

    def nbytes(self, tokens: int, width: int, cache: CacheSpec) -> int:
        """Bytes for one sequence."""
        return self.state_bytes + sum(tensor.nbytes(tokens, width, cache) for tensor in self.tensors)

    @property
    def key_and_value(self) -> tuple[CachedTensor, CachedTensor] | None:
        """The two tensors that a tie K=V would make one: keys and values of one shape; None where there are no such two."""
        named = {tensor.name: tensor for tensor in self.tensors}
        key, value = named.get("keys"), named.get("values")
        if key is None or value is None or replace(value, name="keys") != key:
            return None
        return key, value

    def as_one(self) -> LayerCache:
        """The layer with one tensor in place of keys and values; itself where there are no such two."""
        pair = self.key_and_value
        if pair is None:
            return self
        others = [tensor for tensor in self.tensors if tensor not in pair]
        return replace(self, tensors=(replace(pair[0], name="keys and values"), *others), is_one=True)


def pair(heads: int, dim: int, value_dim: int = 0, *, window_tokens: int = 0) -> tuple[CachedTensor, CachedTensor]:
    """Keys and values of ``heads`` heads; values are as wide as keys unless ``value_dim`` says otherwise."""
    kept: Kept = "window" if window_tokens else "all"
    return (
        CachedTensor(name="keys", heads=heads, dim=dim, kept=kept, size=window_tokens),
        CachedTensor(name="values", heads=heads, dim=value_dim or dim, kept=kept, size=window_tokens),
    )


def cache_bytes(layers: Iterable[LayerCache], tokens: int, *, width: int, batch: int, cache: CacheSpec) -> int:
    """Bytes of the caches of ``batch`` sequences of ``tokens`` each."""
    return batch * sum(layer.nbytes(tokens, width, cache) for layer in layers)


def prompt_bytes(layers: Iterable[LayerCache], tokens: int, *, width: int, batch: int) -> int:
    """The same just after a prompt of ``tokens`` was read at once: Transformers' windows are slices of the whole, which they keep alive."""
    whole = (
        replace(
            layer,
            tensors=tuple(replace(t, kept="all") if t.kept in ("window", "unfinished") else t for t in layer.tensors),
        )
        for layer in layers
    )
    return cache_bytes(whole, tokens, width=width, batch=batch, cache=CacheSpec())


def group_size(dims: Iterable[int], bits: int) -> int:
    """Floats that share a scale: the largest number up to 32 that divides all of ``dims``; 0 where they make no whole bytes."""
    dims = set(dims)
    if any(dim * bits % 8 for dim in dims):
        return 0
    return max(size for size in range(1, MAX_GROUP + 1) if all(dim % min(size, dim) == 0 for dim in dims))


def growing_dims(layers: Sequence[LayerCache]) -> set[int]:
    """Widths of the tensors that may be quantized."""
    return {tensor.dim for layer in layers for tensor in layer.tensors if tensor.kept == "all"}


def growth_period(layers: Sequence[LayerCache]) -> int:
    """Tokens after which a cache has grown as it will grow again: 1, or more where entries stand for blocks of tokens."""
    return lcm(*(t.size for layer in layers for t in layer.tensors if t.kept == "compressed"))
