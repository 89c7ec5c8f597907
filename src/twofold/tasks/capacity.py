"""Associative capacity: so many patterns are stored, then some come again with a few signs turned; each cue asks for its pattern's value.

    + - - + | 3    - - + + | 5    + + - - | 3    + - + +  ?
                                                           5      <- the label at the cue

Attention whose values are its keys is a modern Hopfield memory: a cue is pulled towards the stored pattern that is most like it. The
task asks what a trained model does of this, at a number of patterns against their dimension; :func:`hopfield_retrieval` is the memory
itself, without weights, and :func:`hopfield_capacity` measures how many patterns it holds.
Source: "Hopfield Networks is All You Need" (arXiv:2008.02217, equation 3: the new state is X softmax(β Xᵀ ξ)).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.tasks.options import Options
from twofold.tasks.task import IGNORED, Batch, Part, TableTask, TaskKind, apart, distinct, generator

MAX_REDRAWS = 200
TOLERANCE = 0.1


@dataclass(frozen=True, kw_only=True)
class CapacityOptions(Options):
    """``num_patterns`` patterns of ``dimension`` signs, each with one of ``num_values`` values; of ``num_cues`` cues a share ``noise`` of signs is turned.

    Patterns are so far apart that a cue is always nearest to its own.
    """

    dimension: int = 32
    num_patterns: int = 16
    num_values: int = 8
    num_cues: int = 8
    noise: float = 0.1
    train_size: int = 20_000
    held_out_size: int = 1_000
    data_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "dimension", "num_cues", "train_size", "held_out_size")
        self.require_at_least(2, "num_patterns")
        self.require("num_values", 2 <= self.num_values <= 255, "from 2 to 255")
        self.require("num_cues", self.num_cues <= self.num_patterns, f"at most {self.num_patterns}: each is of another pattern")  # fmt: skip
        self.require("noise", 0 <= self.noise < 0.5, "from 0 up to, not including, 0.5")
        self.require_seed()

    @property
    def num_turned(self) -> int:
        """How many signs of a cue are turned."""
        return round(self.noise * self.dimension)


class CapacityTask(TableTask):
    """Elements are rows of floats, read as a set: the signs, the value as one of ``num_values`` ones, and a 1 that says "cue" (whose value is blank)."""

    def __init__(self, options: CapacityOptions) -> None:
        self._options = options
        train, held_out = apart(partial(_examples, options), options.train_size, options.held_out_size, key="signs")
        # The commonest value of a set, every pattern being asked for equally often.
        commonest = (held_out["values"].numpy()[:, :, None] == np.arange(options.num_values)).sum(axis=1).max(axis=1)
        super().__init__(
            name="capacity",
            train=train,
            held_out=held_out,
            chance=float(commonest.mean()) / options.num_patterns,
            description=f"Values of {options.num_patterns} patterns of {options.dimension} signs, asked for by cues with {options.num_turned} turned: "
            f"{options.train_size:,} sets for training, {options.held_out_size:,} held out.",
            tokens_per_example=options.num_patterns + options.num_cues,
            model_fields={
                "architecture": "token_classification",
                "feature_size": options.dimension + options.num_values + 1,
                "num_labels": options.num_values,
                "causal": False,
                "positions": {"kind": "none"},
            },
        )

    def batch(self, part: Part, rows: Tensor) -> Batch:
        """``features`` float32 [B, N + cues, F], and ``labels`` that are the value at a cue and IGNORED elsewhere."""
        signs, count = part["signs"][rows].float(), self._options.num_patterns
        known = torch.zeros(*signs.shape[:2], self._options.num_values + 1)
        known[:, :count].scatter_(2, part["values"][rows].long()[..., None], 1.0)
        known[:, count:, -1] = 1.0
        return {"features": torch.cat([signs, known], dim=2), "labels": part["labels"][rows].long()}


def _examples(options: CapacityOptions, part: str, size: int) -> dict[str, Tensor]:
    """``signs`` int8 [size, N + cues, D], ``values`` uint8 [size, N] and ``labels`` int16 [size, N + cues]."""
    draws = generator(options.data_seed, part)
    patterns = _patterns(draws, options, size)
    values = draws.randint(0, options.num_values, size=(size, options.num_patterns))
    asked = distinct(draws, size, options.num_cues, options.num_patterns)
    cues = np.take_along_axis(patterns, asked[:, :, None], axis=1)
    turned = distinct(draws, size * options.num_cues, options.num_turned, options.dimension)
    flat = cues.reshape(size * options.num_cues, options.dimension)
    np.put_along_axis(flat, turned, -np.take_along_axis(flat, turned, axis=1), axis=1)
    labels = np.full((size, options.num_patterns + options.num_cues), IGNORED, dtype=np.int16)
    labels[:, options.num_patterns :] = np.take_along_axis(values, asked, axis=1)
    columns = {
        "signs": np.concatenate([patterns, flat.reshape(cues.shape)], axis=1),
        "values": values.astype(np.uint8),
        "labels": labels,
    }
    return {name: torch.from_numpy(column) for name, column in columns.items()}


def _patterns(draws: np.random.RandomState, options: CapacityOptions, size: int) -> np.ndarray:
    """int8 [size, N, D] of ±1, any two of a set further apart than twice the turned signs. Raises TwofoldError where such are not found."""
    shape = (options.num_patterns, options.dimension)
    patterns = np.empty((size, *shape), dtype=np.int8)
    missing = np.arange(size)
    for _ in range(MAX_REDRAWS):
        patterns[missing] = 2 * draws.randint(0, 2, size=(len(missing), *shape)) - 1
        drawn = patterns[missing].astype(np.float32)
        distances = (options.dimension - drawn @ drawn.transpose(0, 2, 1)) / 2 + np.eye(shape[0]) * options.dimension
        missing = missing[distances.min(axis=(1, 2)) <= 2 * options.num_turned]
        if not len(missing):
            return patterns
    raise TwofoldError(
        f"Task capacity: {shape[0]} patterns of {shape[1]} signs are not found so far apart that {options.num_turned} turned signs leave "
        "each cue nearest to its own: raise dimension, or lower num_patterns or noise."
    )


# The memory itself


def hopfield_retrieval(patterns: np.ndarray, states: np.ndarray, *, beta: float, steps: int = 1) -> np.ndarray:
    """States [M, D] after so many steps towards the stored patterns [N, D]; a step is softmax(β ξ Xᵀ) X for each state ξ.

    This is attention with the states as queries and the patterns as keys and values, at scale β. Source: arXiv:2008.02217, equation 3.

    >>> hopfield_retrieval(np.array([[1.0, 1.0], [-1.0, 1.0]]), np.array([[0.5, 0.5]]), beta=20.0).round(3).tolist()
    [[1.0, 1.0]]
    """
    for _ in range(steps):
        logits = beta * states @ patterns.T
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        states = weights @ patterns / weights.sum(axis=1, keepdims=True)
    return states


def hopfield_capacity(
    dimension: int, *, beta: float = 1.0, noise: float = 0.1, steps: int = 1, most: int = 4096, data_seed: int = 0
) -> int:
    """The largest power of two, up to ``most``, of random patterns of ±1 of which 99 in 100 cues are retrieved: after ``steps`` every number is within :data:`TOLERANCE`.

    Cues are 256 patterns (or all, if there are fewer), drawn with a share ``noise`` of their signs turned, at each of 4 draws of patterns.
    0 where even two are too many.
    """
    held, draws = 0, generator(data_seed, "memory")
    for count in (2**power for power in range(1, most.bit_length())):
        right = list[bool]()
        for _ in range(4):
            patterns = 2.0 * draws.randint(0, 2, size=(count, dimension)) - 1
            asked = patterns[: min(count, 256)]
            turned = distinct(draws, len(asked), round(noise * dimension), dimension)
            cues = asked.copy()
            np.put_along_axis(cues, turned, -np.take_along_axis(cues, turned, axis=1), axis=1)
            found = hopfield_retrieval(patterns, cues, beta=beta, steps=steps)
            right += (np.abs(found - asked).max(axis=1) < TOLERANCE).tolist()
        if np.mean(right) < 0.99:
            break
        held = count
    return held


KINDS = (
    TaskKind(
        name="capacity",
        summary="the value of a stored pattern, asked for by a noisy copy of it (a Hopfield memory)",
        options=CapacityOptions,
        load=CapacityTask,
    ),
)
