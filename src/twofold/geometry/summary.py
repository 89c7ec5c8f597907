"""What is measured of the layers, head by head, and beside it what random matrices of the same shapes give.

A number such as a CKA of 0.6 says nothing until one knows what unrelated projections of the same activations would give. So every
measure is taken again many times with free projections drawn at random (normal, as large as the trained ones), the tie's other roles made
of them by the tie's own coefficients, applied to the very same activations. Biases are left out of what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from twofold.geometry import measures
from twofold.geometry.capture import Layer

Per = Literal["KV head", "query head", "layer"]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measure: of what, where its values can lie, and what it says."""

    key: str
    name: str
    per: Per
    low: float
    high: float
    meaning: str


MEASURES: tuple[Measure, ...] = (
    Measure(
        key="cos_weights",
        name="cos(W_K, W_V)",
        per="KV head",
        low=-1,
        high=1,
        meaning="cosine of the two weight matrices, entry by entry; a change of a head's basis changes it",
    ),
    Measure(
        key="cos_kv",
        name="cos(K, V)",
        per="KV head",
        low=-1,
        high=1,
        meaning="cosine of a token's key and value, mean over tokens; a change of a head's basis changes it",
    ),
    Measure(
        key="cos_qk",
        name="cos(Q, K)",
        per="query head",
        low=-1,
        high=1,
        meaning="cosine of a token's query and its own key, mean over tokens",
    ),
    Measure(
        key="cos_qv",
        name="cos(Q, V)",
        per="query head",
        low=-1,
        high=1,
        meaning="cosine of a token's query and its own value, mean over tokens",
    ),
    Measure(
        key="cka_kv",
        name="CKA(K, V)",
        per="KV head",
        low=0,
        high=1,
        meaning="whether tokens that are alike as keys are alike as values (linear CKA)",
    ),
    Measure(
        key="overlap_kv",
        name="shared directions of W_K and W_V",
        per="KV head",
        low=0,
        high=1,
        meaning="mean cos² of the principal angles between their row spaces: what the two read of the layer's input; no change of basis changes it",
    ),
    Measure(
        key="symmetry_qk",
        name="symmetry of W_QK",
        per="query head",
        low=0,
        high=1,
        meaning="norm of the symmetric part of W_Qᵀ W_K over that of all of it: 1 symmetric, √½ random, 0 antisymmetric",
    ),
    Measure(
        key="entropy",
        name="attention entropy",
        per="query head",
        low=0,
        high=1,
        meaning="entropy of a query's weights over that of weights spread evenly: 1 is even",
    ),
    Measure(
        key="peak_first",
        name="largest weight, step 1",
        per="query head",
        low=0,
        high=1,
        meaning="the largest of a query's weights, mean over the tokens that are drawn; where V = K",
    ),
    Measure(
        key="peak_last",
        name="largest weight, last step",
        per="query head",
        low=0,
        high=1,
        meaning="the same after the pull has been repeated: 1 where it ends at one key, less where it ends at a mean of several",
    ),
    Measure(
        key="rank_wk",
        name="effective rank of W_K",
        per="layer",
        low=0,
        high=1,
        meaning="of all heads together, as a share of the most that its shape allows",
    ),
    Measure(
        key="rank_wv",
        name="effective rank of W_V",
        per="layer",
        low=0,
        high=1,
        meaning="of all heads together, as a share of the most that its shape allows",
    ),
    Measure(
        key="rank_k",
        name="effective rank of K",
        per="layer",
        low=0,
        high=1,
        meaning="keys of all tokens, all heads together, as a share of the most that their shape allows",
    ),
    Measure(
        key="rank_v",
        name="effective rank of V",
        per="layer",
        low=0,
        high=1,
        meaning="values of all tokens, all heads together, as a share of the most that their shape allows",
    ),
)
BY_KEY: Mapping[str, Measure] = {measure.key: measure for measure in MEASURES}

Values = dict[str, list[float]]
MIN_RANK_DRAWS, RANK_WORK = 3, 4e9
"""Random matrices of all heads are drawn as often as ``RANK_WORK`` multiplications allow; their effective ranks hardly vary."""
MEANS = 4_000
"""How many means over random heads are made of those that were drawn."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """The mean of random draws and the range from their 2.5th to their 97.5th percentile."""

    mean: float
    low: float
    high: float
    draws: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Range:
        """NaN where there are none."""
        if not values:
            return cls(mean=math.nan, low=math.nan, high=math.nan, draws=0)
        low, high = np.quantile(values, (0.025, 0.975))
        return cls(mean=float(np.mean(values)), low=float(low), high=float(high), draws=len(values))

    def holds(self, value: float) -> bool:
        """Whether the value is one that a random draw would give; rounding is forgiven."""
        return self.low - 1e-6 <= value <= self.high + 1e-6


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measure over the layers: ``values`` and ``random`` by layer, and both pooled; ``untrained`` is the mean of an untrained model.

    ``pooled`` is the range of single random heads; ``of_mean`` that of the mean over as many of them as there are ``values``, which is far narrower.
    """

    measure: Measure
    values: tuple[tuple[float, ...], ...]
    random: tuple[Range, ...]
    pooled: Range
    of_mean: Range
    untrained: float = math.nan

    @property
    def all_values(self) -> list[float]:
        """Of every layer and head."""
        return [value for layer in self.values for value in layer]

    @property
    def mean(self) -> float:
        """Over layers and heads."""
        return float(np.mean(self.all_values)) if self.all_values else math.nan

    @property
    def outside(self) -> int:
        """How many values lie outside the range of their own layer's random draws."""
        return sum(
            random.draws > 0 and not random.holds(value)
            for values, random in zip(self.values, self.random, strict=True)
            for value in values
        )

    @property
    def is_given(self) -> bool:
        """Whether the tie alone decides the value: every random draw that obeys it gives the same."""
        return self.pooled.draws > 1 and self.pooled.high - self.pooled.low < 1e-6

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "key": self.measure.key,
            "name": self.measure.name,
            "per": self.measure.per,
            "meaning": self.measure.meaning,
            "mean": self.mean,
            "low": min(self.all_values, default=math.nan),
            "high": max(self.all_values, default=math.nan),
            "outside": self.outside,
            "of": len(self.all_values),
            "given_by_the_tie": self.is_given,
            "random": vars(self.pooled),
            "random_of_mean": vars(self.of_mean),
            "untrained": self.untrained,
            "values": [list(values) for values in self.values],
            "random_by_layer": [vars(random) for random in self.random],
        }


def measure_layers(layers: Sequence[Layer], *, draws: int, seed: int = 0) -> list[Row]:
    """Every measure that the layers have, with ``draws`` random heads for each layer."""
    found = [_of_layer(layer) for layer in layers]
    generator = torch.Generator().manual_seed(seed)
    drawn = [_random(layer, draws, generator) for layer in layers]
    rows = []
    for measure in MEASURES:
        values = [one.get(measure.key, []) for one in found]
        random = [one.get(measure.key, []) for one in drawn]
        rows.append(
            Row(
                measure=measure,
                values=tuple(map(tuple, values)),
                random=tuple(map(Range.of, random)),
                pooled=Range.of([value for one in random for value in one]),
                of_mean=_of_mean(random, list(map(len, values)), seed),
            )
        )
    return [row for row in rows if row.all_values]


def _of_mean(random: Sequence[Sequence[float]], counts: Sequence[int], seed: int) -> Range:
    """What the mean over ``counts`` heads of each layer is where each is one of its layer's random draws."""
    held = [(draws, count) for draws, count in zip(random, counts, strict=True) if count]
    if not held or not all(draws for draws, _ in held):
        return Range.of(())
    stream = np.random.default_rng(seed)
    sums = [stream.choice(draws, size=(MEANS, count)).sum(axis=1) for draws, count in held]
    return Range.of(list(np.sum(sums, axis=0) / sum(counts)))


def means(layers: Sequence[Layer]) -> dict[str, float]:
    """The mean of each measure over layers and heads, without random draws: of an untrained model, say."""
    found = [_of_layer(layer) for layer in layers]
    pooled = {key: [value for one in found for value in one.get(key, [])] for key in BY_KEY}
    return {key: float(np.mean(values)) for key, values in pooled.items() if values}


def _of_layer(layer: Layer) -> Values:
    values: Values = {key: [] for key in BY_KEY}
    w_q, w_k, w_v = (projection.weight for projection in layer.projections)
    for g in range(len(w_k)):
        _add(values, _key_value(w_k[g], w_v[g], layer.key[g], layer.value[g]))
    for h in range(len(w_q)):
        g = h // layer.group
        _add(values, _query((w_q[h], w_k[g]), (layer.query[h], layer.key[g], layer.value[g])))
    values["entropy"] = layer.entropy.tolist()
    if len(layer.shown.weights) > 1:
        first, last = (layer.shown.weights[step].amax(dim=-1).mean(dim=-1).tolist() for step in (0, -1))
        values |= {"peak_first": first, "peak_last": last}
    _add(values, _ranks(w_k.flatten(0, 1), w_v.flatten(0, 1), _side_by_side(layer.key), _side_by_side(layer.value)))
    return values


def _key_value(w_k: Tensor, w_v: Tensor, key: Tensor, value: Tensor) -> dict[str, float]:
    found = {"cka_kv": measures.linear_cka(key, value), "overlap_kv": measures.overlap(w_k, w_v)}
    if w_k.shape == w_v.shape:
        found |= {"cos_weights": measures.cosine(w_k, w_v), "cos_kv": measures.mean_cosine(key, value)}
    return found


def _query(weights: tuple[Tensor, Tensor], made: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    """Of a head's query with its KV head; only those dimensions of a key count that are compared."""
    (w_q, w_k), (query, key, value) = weights, made
    compared = w_q.shape[0]
    found = {
        "cos_qk": measures.mean_cosine(query, key[:, :compared]),
        "symmetry_qk": measures.symmetry_of_product(w_q, w_k[:compared]),
    }
    if query.shape == value.shape:
        found["cos_qv"] = measures.mean_cosine(query, value)
    return found


def _ranks(w_k: Tensor, w_v: Tensor, key: Tensor, value: Tensor) -> dict[str, float]:
    matrices = {"rank_wk": w_k, "rank_wv": w_v, "rank_k": key, "rank_v": value}
    return {name: measures.effective_rank(matrix) / min(matrix.shape) for name, matrix in matrices.items()}


def _random(layer: Layer, draws: int, generator: torch.Generator) -> Values:
    values: Values = {}
    inputs = layer.inputs.cpu()
    for _ in range(draws):
        w_q, w_k, w_v = (weights[0] for weights in _drawn(layer, 1, generator))
        query, key, value = (inputs @ weights.T for weights in (w_q, w_k, w_v))
        _add(values, _key_value(w_k, w_v, key, value) | _query((w_q, w_k), (query, key, value)))
        _add(values, {"entropy": _entropy(query[: layer.row], key[: layer.row], layer.scale)})
    for _ in range(min(draws, _rank_draws(layer))):
        _, w_k, w_v = (weights.flatten(0, 1) for weights in _drawn(layer, layer.key.shape[0], generator))
        _add(values, _ranks(w_k, w_v, inputs @ w_k.T, inputs @ w_v.T))
    return values


def _rank_draws(layer: Layer) -> int:
    width = layer.key.shape[0] * layer.key.shape[2]
    work = 4 * max(layer.inputs.shape[1], layer.inputs.shape[0]) * width * min(width, layer.inputs.shape[1])
    return max(MIN_RANK_DRAWS, int(RANK_WORK / work))


def _drawn(layer: Layer, heads: int, generator: torch.Generator) -> Iterator[Tensor]:
    """W_Q, W_K and W_V [heads, D, C] of ``heads`` heads: free ones drawn, the others made by the tie."""
    free = _free_roles(layer.matrix)
    made = []
    for role in free:
        weight = layer.projections[role].weight.float()
        size = float(weight.square().mean().sqrt())
        made.append(size * torch.randn(heads, *weight.shape[1:], generator=generator))
    for row in layer.matrix:
        yield sum(
            (coefficient * part for coefficient, part in zip(row, made, strict=True) if coefficient),
            start=torch.zeros(()),
        )


def _free_roles(matrix: Sequence[Sequence[float]]) -> list[int]:
    """For each column the first role whose row is that unit row: the tie's free projections."""
    count = len(matrix[0])
    units = [[float(i == column) for i in range(count)] for column in range(count)]
    return [next(role for role, row in enumerate(matrix) if list(row) == unit) for unit in units]


def _entropy(query: Tensor, key: Tensor, scale: float) -> float:
    """Of causal attention without positions."""
    tokens = len(query)
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    logits = (scale * query.double() @ key[:, : query.shape[1]].double().T).masked_fill(hidden, -torch.inf)
    return float(measures.relative_entropy(torch.softmax(logits, dim=-1), torch.arange(tokens) + 1))


def _add(values: Values, found: Mapping[str, float]) -> None:
    for key, value in found.items():
        values.setdefault(key, []).append(value)


def _side_by_side(x: Tensor) -> Tensor:
    """[heads, N, D] -> [N, heads · D]."""
    return x.transpose(0, 1).flatten(1)
