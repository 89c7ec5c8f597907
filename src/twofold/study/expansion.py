"""From a plan to its runs: each variant's whole model on each task, checked before anything is trained.

A model's fields come, later ones winning, from the plan's ``model``, what the task dictates, what the task's entry and grid change, the
variant, and what the entry and grid say of that variant. What a task dictates is asked of it once; asking loads its data, so it is done where
torch is (see :mod:`twofold.study.worker`), and this module needs none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from twofold.cost import dtype_bytes, mean_cached_floats_per_token, parameters, training_flops_per_token
from twofold.errors import TwofoldError
from twofold.spec import ModelSpec
from twofold.study.plan import PlannedTask, StudyPlan
from twofold.study.record import Entry, TaskFacts
from twofold.study.sections import Match, Variant
from twofold.task_spec import TaskSpec
from twofold.training.spec import RunSpec, TrainingSpec, fingerprint_of

TOLERANCE = 0.01
CACHE_DTYPE = "bf16"


@dataclass(frozen=True, kw_only=True)
class TaskAnswer:
    """What a task says of itself."""

    model_fields: Mapping[str, Any]
    description: str
    loss_metric: str
    score: str
    higher_is_better: bool
    train_size: int
    tokens_per_example: int
    data_hash: str
    held_out_size: int = 0
    chance: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Model:
    """A model and its counts; a layer with a window caches what it holds of a whole example, over the example's tokens (rounded)."""

    spec: ModelSpec
    parameters: int
    cached_floats_per_token: int

    @classmethod
    def of(cls, fields: Mapping[str, Any], context: int) -> Self:
        spec = ModelSpec.from_dict(fields)
        cached = round(mean_cached_floats_per_token(spec, context))
        return cls(spec=spec, parameters=parameters(spec), cached_floats_per_token=cached)


def expand(
    plan: StudyPlan, ask: Callable[[TaskSpec], TaskAnswer], needed: Collection[str] | None = None
) -> tuple[dict[str, TaskFacts], tuple[Entry, ...]]:
    """The facts of the plan's tasks and its entries, in the order in which they are run.

    A task that is not ``needed`` (None: all are) and cannot be asked, because its data are not there, is left out.

    Raises TwofoldError, naming task and variant, for a model that cannot be and for a control that does not match what it says it matches.
    """
    return _Expansion(plan, ask).expand(needed)


class _Expansion:
    """What is asked of a task, and what a model counts, is worked out once: a grid repeats both many times."""

    def __init__(self, plan: StudyPlan, ask: Callable[[TaskSpec], TaskAnswer]) -> None:
        self.plan = plan
        self._ask = ask
        self._answers: dict[str, TaskAnswer] = {}
        self._models: dict[str, _Model] = {}

    def expand(self, needed: Collection[str] | None) -> tuple[dict[str, TaskFacts], tuple[Entry, ...]]:
        facts: dict[str, TaskFacts] = {}
        entries: list[Entry] = []
        for task in self.plan.planned_tasks:
            spec = TaskSpec(name=task.task, options=task.options)
            try:
                answer = self._answer(task, spec)
            except TwofoldError:
                if needed is None or task.name in needed:
                    raise
                continue
            facts[task.name] = _facts(task, answer)
            entries += self._entries(task, spec, answer)
        return facts, tuple(entries)

    def _answer(self, task: PlannedTask, spec: TaskSpec) -> TaskAnswer:
        key = json.dumps([spec.name, dict(spec.options)], sort_keys=True)
        if key not in self._answers:
            self._answers[key] = _named(f"task {task.name}", partial(self._ask, spec))
        return self._answers[key]

    def _entries(self, task: PlannedTask, spec: TaskSpec, answer: TaskAnswer) -> Iterator[Entry]:
        training = _named(f"task {task.name}", lambda: TrainingSpec(**task.training))
        chosen = [variant for variant in self.plan.variants if variant.name in task.variants]
        for variant in chosen:
            # Of the variants that the task leaves out, which need not fit it, only those are made that are matched.
            model = self._model(task, variant, answer)
            for match in variant.matches:
                other = self._model(task, self.plan.variant(match.variant), answer)
                _check(match, task, variant, model=model, other=other, context=answer.tokens_per_example)
            if variant.expect:
                promised = self.plan.variant(variant.expect.variant)
                if model == self._model(task, promised, answer) and variant.seed_shift == promised.seed_shift:
                    raise TwofoldError(
                        f"On task {task.name}, {variant.name} is {promised.name} again, with the same seeds, so what it expects cannot fail: "
                        "give it a seed_shift, or another model."
                    )
            run = RunSpec(task=spec, model=model.spec, training=training, seed=0).to_dict()
            yield Entry(
                task=task.name,
                variant=variant.name,
                label=variant.label or model.spec.mechanism,
                tie=str(model.spec.tie),
                kind=variant.kind,
                note=variant.note,
                parameters=model.parameters,
                cached_floats_per_token=model.cached_floats_per_token,
                cached_bytes_per_token=model.cached_floats_per_token * dtype_bytes(CACHE_DTYPE),
                data_hash=answer.data_hash,
                run={name: value for name, value in run.items() if name != "seed"},
                fingerprints={
                    seed: fingerprint_of(run | {"seed": seed + variant.seed_shift}) for seed in self.plan.all_seeds
                },
                seed_shift=variant.seed_shift,
            )

    def _model(self, task: PlannedTask, variant: Variant, answer: TaskAnswer) -> _Model:
        of_variant = task.variant_models.get(variant.name, {})
        fields = {**self.plan.model, **answer.model_fields, **task.model, **variant.model, **of_variant}
        context = answer.tokens_per_example
        key = json.dumps([fields, context], sort_keys=True)
        if key not in self._models:
            self._models[key] = _named(f"task {task.name}, variant {variant.name}", lambda: _Model.of(fields, context))
        return self._models[key]


def _facts(task: PlannedTask, answer: TaskAnswer) -> TaskFacts:
    return TaskFacts(
        title=task.title, description=answer.description, loss_metric=answer.loss_metric, score=answer.score,
        higher_is_better=answer.higher_is_better, group=task.group, points=task.points, train_size=answer.train_size,
        tokens_per_example=answer.tokens_per_example, data_hash=answer.data_hash, held_out_size=answer.held_out_size,
        chance=answer.chance,
    )  # fmt: skip


def _check(match: Match, task: PlannedTask, variant: Variant, *, model: _Model, other: _Model, context: int) -> None:
    what, tolerance = _QUANTITIES[match.quantity]
    has, wanted = (_amount(match.quantity, counted, context) for counted in (model, other))
    if abs(has - wanted) > tolerance * wanted:
        raise TwofoldError(
            f"On task {task.name}, {variant.name} has {has:.12g} {what} and {match.variant}, which it says it matches, has {wanted:.12g}: "
            "change its heads or sizes, or drop the claim from its matches."
        )


# What must agree, and by which part of itself it may differ.
_QUANTITIES = {
    "cache": ("cached floats per token", 0.0),
    "parameters": ("parameters", TOLERANCE),
    "flops": ("operations of training per token", TOLERANCE),
}


def _amount(quantity: str, model: _Model, context: int) -> float:
    if quantity == "flops":
        return training_flops_per_token(model.spec, context)
    return model.cached_floats_per_token if quantity == "cache" else model.parameters


def _named(where: str, make: Callable[[], Any]) -> Any:
    """What ``make`` gives; its error says where in the plan it arose."""
    try:
        return make()
    except TwofoldError as error:
        raise TwofoldError(f"In {where}: {error}") from error
    except TypeError as error:
        raise TwofoldError(f"In {where}: this does not fit together ({error}).") from error
