"""How much memory a model needs: its weights, its cache with this tie or that, and what fits beside them.

:class:`Holding` is one way to hold one model's cache, counted at the length and batch that are asked for; :class:`Estimate` is a table of
them. Counting loads no torch. A model of ours is counted by :mod:`twofold.cost`, any Transformers model by what its own cache keeps
(:mod:`twofold.estimate.fields`, and :mod:`twofold.estimate.engine`, which asks the model itself and needs Transformers).

Activations, the framework's own memory and a growing cache's old copy come on top; none of them is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from twofold.cache_spec import CacheSpec
from twofold.cost import cache_bytes, cached_streams, dtype_bytes, parameters
from twofold.errors import TwofoldError
from twofold.estimate.layers import LayerCache, group_size, growing_dims, growth_period
from twofold.estimate.layers import cache_bytes as layers_bytes
from twofold.spec import ModelSpec
from twofold.tie import TiePattern

TIES = ("(Q, K, V)", "(Q, K=V)")
"""What a model's own tie is shown beside."""
QUANTIZATIONS = (0, 8, 4)
"""Bits per cached float, in groups; 0: as computed."""
CODES = CacheSpec(bits=8, axis="head")
"""What kernels read as it is held; caches of ours alone have it."""
MOST = 2**40
"""Where a search ends: a cache of windows alone fits any text."""

Count = Callable[[int, int], int]


@dataclass(frozen=True, kw_only=True)
class Question:
    """``tokens`` of each of ``batch`` sequences in ``dtype``, and the bytes of ``memory`` that there are (0: not asked)."""

    tokens: int = 32768
    batch: int = 1
    dtype: str = "bf16"
    memory: int = 0

    def __post_init__(self) -> None:
        dtype_bytes(self.dtype)
        for name in ("tokens", "batch"):
            if getattr(self, name) < 1:
                raise TwofoldError(
                    f"{name} is {getattr(self, name)}, but a cache holds at least 1: give a whole number of at least 1."
                )


@dataclass(frozen=True, kw_only=True)
class Holding:
    """One way to hold one cache. ``bits`` 0: as computed. Bytes per token are what one more token of one sequence adds, rounded up.

    Bits without a ``group_size`` are codes that kernels read, with a scale for each token of a head.
    ``longest_context`` is that of ``batch`` sequences and ``largest_batch`` that of ``tokens`` tokens, weights beside them in the memory; None
    where no memory was given. ``context_ends`` says what ends the context: "memory", "positions" of the model, or "nothing".
    """

    name: str
    bits: int
    group_size: int
    weight_bytes: int
    cache_bytes: int
    bytes_per_token: int
    longest_context: int | None = None
    largest_batch: int | None = None
    context_ends: str = ""

    @property
    def total_bytes(self) -> int:
        """Weights and cache."""
        return self.weight_bytes + self.cache_bytes


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A model, what was asked, and every way to hold its cache. ``position_limit`` 0: the model sets no end to a text."""

    model: str
    question: Question
    parameters: int
    position_limit: int
    holdings: tuple[Holding, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


# Models of ours


def estimate_spec(spec: ModelSpec, name: str, question: Question, ties: Sequence[str] = ()) -> Estimate:
    """A model of ours with each of the ``ties``, or with its own beside :data:`TIES`.

    Raises TieError for a tie that cannot be read, and TwofoldError for a model without a cache and for a given tie that it cannot have.

    >>> from twofold.presets import PRESETS
    >>> table = estimate_spec(PRESETS["paper-300m"], "paper-300m", Question(batch=8))
    >>> [(row.name, row.bits, row.group_size, row.cache_bytes // 2**20) for row in table.holdings[:4]]
    [('(Q, K, V)', 0, 0, 20480), ('(Q, K, V)', 8, 0, 10880), ('(Q, K, V)', 8, 32, 11520), ('(Q, K, V)', 4, 32, 6400)]
    """
    if spec.architecture != "causal_lm":
        raise TwofoldError(f"{name} is a {spec.architecture}: only a causal_lm keeps a cache.")
    limit = spec.positions.max_positions
    holdings: list[Holding] = []
    notes = list(_beyond(limit, question))
    patterns = dict.fromkeys((TiePattern.parse(tie), spec.latent_dim) for tie in ties)
    for pattern, latent_dim in patterns or dict.fromkeys(
        [(spec.tie, spec.latent_dim), *((TiePattern.parse(tie), 0) for tie in TIES)]
    ):
        try:
            tied = spec.with_changes(tie=pattern, latent_dim=latent_dim)
        except TwofoldError as error:
            if ties:
                raise
            notes.append(f"{pattern}: {error}")
            continue
        weights = parameters(tied) * dtype_bytes(question.dtype)
        dims = {dim for index in range(tied.num_hidden_layers) for _, dim in cached_streams(tied.attention(index))}
        as_computed, *in_groups = (cache_of(dims, bits) for bits in QUANTIZATIONS)
        for cache in (as_computed, CODES, *in_groups):
            if cache is not None:
                count = _spec_count(tied, question.dtype, cache)
                holdings.append(_held(tied.mechanism, cache, weights, count, question, limit))
    return Estimate(
        model=name,
        question=question,
        parameters=parameters(spec),
        position_limit=limit,
        holdings=tuple(holdings),
        notes=tuple(notes),
    )


def _spec_count(spec: ModelSpec, dtype: str, cache: CacheSpec) -> Count:
    return lambda tokens, batch: cache_bytes(spec, tokens, dtype, batch, cache)


# Any model


def estimate_layers(
    ways: Sequence[tuple[str, Sequence[LayerCache]]],
    name: str,
    question: Question,
    *,
    parameters: int,
    weight_bytes: int,
    position_limit: int = 0,
    notes: Sequence[str] = (),
) -> Estimate:
    """A model whose cache may be held in each of some ways, (what it is called, the layers' caches)."""
    width = dtype_bytes(question.dtype)
    holdings = []
    for way, layers in ways:
        for bits in QUANTIZATIONS:
            if (cache := cache_of(growing_dims(layers), bits)) is not None:
                count = _layers_count(layers, width, cache)
                held = _held(way, cache, weight_bytes, count, question, position_limit, step=growth_period(layers))
                holdings.append(held)
    return Estimate(
        model=name,
        question=question,
        parameters=parameters,
        position_limit=position_limit,
        holdings=tuple(holdings),
        notes=(*_beyond(position_limit, question), *notes),
    )


def _layers_count(layers: Sequence[LayerCache], width: int, cache: CacheSpec) -> Count:
    return lambda tokens, batch: layers_bytes(layers, tokens, width=width, batch=batch, cache=cache)


def cache_of(dims: set[int], bits: int) -> CacheSpec | None:
    """The cache of so many bits for tensors of these widths, the largest groups that fit them all; None where there is none to quantize."""
    if not bits:
        return CacheSpec()
    size = group_size(dims, bits) if dims else 0
    return CacheSpec(bits=bits, group_size=size) if size else None


def _held(
    name: str, cache: CacheSpec, weights: int, count: Count, question: Question, limit: int, step: int = 1
) -> Holding:
    tokens, batch = question.tokens, question.batch
    fits: dict[str, Any] = {}
    if question.memory:
        room = question.memory - weights
        longest = _largest(lambda length: count(length, batch) <= room)
        ends = "memory" if longest < MOST else "nothing"
        if 0 < limit < longest:
            longest, ends = limit, "positions"
        fits = {
            "longest_context": longest,
            "context_ends": ends,
            "largest_batch": _largest(lambda sequences: count(tokens, sequences) <= room),
        }
    return Holding(
        name=name,
        bits=cache.bits,
        group_size=cache.group_size if cache.bits and cache.axis != "head" else 0,
        weight_bytes=weights,
        cache_bytes=count(tokens, batch),
        bytes_per_token=-((count(tokens, 1) - count(tokens + step, 1)) // step),
        **fits,
    )


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest number from 0 to :data:`MOST` up to which ``fits`` holds; at 0 it is taken to hold."""
    high = 1
    while high < MOST and fits(high):
        high *= 2
    low, high = high // 2, min(high, MOST)
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _beyond(limit: int, question: Question) -> Iterator[str]:
    if 0 < limit < question.tokens:
        yield f"{question.tokens:,} tokens are more than the {limit:,} positions that the model has."
