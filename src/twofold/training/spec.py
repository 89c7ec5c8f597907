"""How a model is fitted, and what a run is: values without torch, turned into JSON and back without loss."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

from twofold.errors import TwofoldError
from twofold.spec import ModelSpec
from twofold.task_spec import TaskSpec

Schedule = Literal["cosine", "constant_with_decay"]
Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """Optimiser, schedule and cadence.

    ``steps`` counts optimiser steps; each uses ``batch_size`` examples in ``accumulation_steps`` equal parts. The learning rate rises
    linearly over ``warmup_steps`` and then falls to ``learning_rate * min_learning_rate_ratio``: along a cosine, or linearly over the last
    ``decay_fraction`` of the steps. A cadence of 0 means "only at the end". ``clip_norm`` 0 means no clipping.
    """

    steps: int
    batch_size: int
    learning_rate: float
    accumulation_steps: int = 1
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    min_learning_rate_ratio: float = 0.1
    decay_fraction: float = 0.2
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    precision: Precision = "no"
    evaluate_every: int = 0
    checkpoint_every: int = 0
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation_steps", "log_every"):
            _require(
                self, name, _is_whole(getattr(self, name)) and getattr(self, name) >= 1, "a whole number of at least 1"
            )
        for name in ("warmup_steps", "evaluate_every", "checkpoint_every"):
            _require(
                self, name, _is_whole(getattr(self, name)) and getattr(self, name) >= 0, "a whole number of 0 or more"
            )
        for name in ("learning_rate", "min_learning_rate_ratio", "decay_fraction", "clip_norm", "weight_decay"):
            _require(self, name, _is_number(getattr(self, name)), "a number")
        for name in ("clip_norm", "weight_decay"):
            _require(self, name, getattr(self, name) >= 0, "0 or more")
        _require(
            self, "betas", isinstance(self.betas, (tuple, list)) and all(map(_is_number, self.betas)), "two numbers"
        )
        object.__setattr__(self, "betas", tuple(self.betas))
        _require(self, "learning_rate", 0 < self.learning_rate < float("inf"), "a positive number")
        _require(self, "min_learning_rate_ratio", 0 <= self.min_learning_rate_ratio <= 1, "between 0 and 1")
        _require(self, "decay_fraction", 0 <= self.decay_fraction <= 1, "between 0 and 1")
        _require(
            self,
            "betas",
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "two numbers from 0 up to 1",
        )
        _require(self, "schedule", self.schedule in get_args(Schedule), f"one of {', '.join(get_args(Schedule))}")
        _require(self, "precision", self.precision in get_args(Precision), f"one of {', '.join(get_args(Precision))}")
        if self.batch_size % self.accumulation_steps:
            raise TwofoldError(
                f"A batch of {self.batch_size} examples does not split into {self.accumulation_steps} equal parts; "
                "change batch_size or accumulation_steps."
            )


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Everything that decides the outcome of one training run, on one kind of machine.

    ``seed`` draws the initial weights and the order of the data; runs of different ties that share it share both (see design: paired seeds).
    """

    task: TaskSpec
    model: ModelSpec
    training: TrainingSpec
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; :meth:`from_dict` gives the same run back."""
        training = asdict(self.training) | {"betas": list(self.training.betas)}
        task = {"name": self.task.name, "options": dict(self.task.options)}
        return {"task": task, "model": self.model.to_dict(), "training": training, "seed": self.seed}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A run from :meth:`to_dict`'s fields. Raises TwofoldError where one is unknown, missing or out of range."""
        try:
            return cls(
                task=TaskSpec(**values["task"]),
                model=ModelSpec.from_dict(values["model"]),
                training=TrainingSpec(**values["training"]),
                seed=int(values["seed"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise TwofoldError(
                f"This is not a whole run: {error}; a run holds {', '.join(f.name for f in fields(cls))}."
            ) from None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the run's canonical JSON: two runs are the same exactly when these agree."""
        return fingerprint_of(self.to_dict())


def fingerprint_of(run: Mapping[str, Any]) -> str:
    """The fingerprint of a run that is given as :meth:`RunSpec.to_dict` makes it."""
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require(spec: object, name: str, holds: bool, wanted: str) -> None:
    if not holds:
        raise TwofoldError(f"{name} is {getattr(spec, name)!r}, but it must be {wanted}.")
