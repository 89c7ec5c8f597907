"""From a plan to its runs: each variant's whole model on each task, checked before anything is trained.

A model's fields come, later ones winning, from the plan's ``model``, what the task dictates, what the task's entry and grid change, the
variant, and what the entry and grid say of that variant. What a task dictates is asked of it once; asking loads its data, so it is done where
torch is (see :mod:`twofold.study.worker`), and this module needs none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from twofold.cost import cached_bytes_per_token, cached_floats_per_token, parameters
from twofold.errors import TwofoldError
from twofold.spec import ModelSpec
from twofold.study.plan import PlannedTask, StudyPlan, Variant
from twofold.study.record import Entry, TaskFacts
from twofold.training.spec import RunSpec, TaskSpec, TrainingSpec

PARAMETER_TOLERANCE = 0.01


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


def expand(plan: StudyPlan, ask: Callable[[TaskSpec], TaskAnswer]) -> tuple[dict[str, TaskFacts], tuple[Entry, ...]]:
    """The facts of the plan's tasks and its entries, in the order in which they are run.

    Raises TwofoldError, naming task and variant, for a model that cannot be and for a control that does not match what it says it matches.
    """
    answers: dict[str, TaskAnswer] = {}
    facts: dict[str, TaskFacts] = {}
    entries: list[Entry] = []
    for task in plan.planned_tasks:
        spec = TaskSpec(name=task.task, options=task.options)
        key = json.dumps([spec.name, dict(spec.options)], sort_keys=True)
        if key not in answers:
            answers[key] = _named(f"task {task.name}", partial(ask, spec))
        answer = answers[key]
        facts[task.name] = _facts(task, answer)
        entries += _entries(plan, task, spec, answer)
    return facts, tuple(entries)


def _facts(task: PlannedTask, answer: TaskAnswer) -> TaskFacts:
    return TaskFacts(
        title=task.title, description=answer.description, loss_metric=answer.loss_metric, score=answer.score,
        higher_is_better=answer.higher_is_better, group=task.group, points=task.points, train_size=answer.train_size,
        tokens_per_example=answer.tokens_per_example, data_hash=answer.data_hash,
    )  # fmt: skip


def _entries(plan: StudyPlan, task: PlannedTask, spec: TaskSpec, answer: TaskAnswer) -> Iterator[Entry]:
    training = _named(f"task {task.name}", lambda: TrainingSpec(**task.training))
    chosen = [variant for variant in plan.variants if variant.name in task.variants]
    # A variant that the task leaves out need not fit it (a + on a causal task): only those that are run, or matched, are made.
    needed = {variant.name for variant in chosen} | {match.variant for variant in chosen for match in variant.matches}
    models = {name: _model(plan, task, plan.variant(name), answer) for name in sorted(needed)}
    for variant in chosen:
        model = models[variant.name]
        _check_matches(task, variant, models)
        runs = [RunSpec(task=spec, model=model, training=training, seed=seed) for seed in plan.seeds]
        yield Entry(
            task=task.name,
            variant=variant.name,
            label=variant.label or str(model.tie),
            tie=str(model.tie),
            kind=variant.kind,
            note=variant.note,
            parameters=parameters(model),
            cached_floats_per_token=cached_floats_per_token(model),
            cached_bytes_per_token=cached_bytes_per_token(model, "bf16"),
            data_hash=answer.data_hash,
            run={name: value for name, value in runs[0].to_dict().items() if name != "seed"},
            fingerprints={run.seed: run.fingerprint for run in runs},
        )


def _model(plan: StudyPlan, task: PlannedTask, variant: Variant, answer: TaskAnswer) -> ModelSpec:
    of_variant = task.variant_models.get(variant.name, {})
    fields = {**plan.model, **answer.model_fields, **task.model, **variant.model, **of_variant}
    return _named(f"task {task.name}, variant {variant.name}", lambda: ModelSpec.from_dict(fields))


def _check_matches(task: PlannedTask, variant: Variant, models: Mapping[str, ModelSpec]) -> None:
    own = models[variant.name]
    for match in variant.matches:
        other = models[match.variant]
        count = cached_floats_per_token if match.quantity == "cache" else parameters
        has, wanted = count(own), count(other)
        tolerance = 0 if match.quantity == "cache" else PARAMETER_TOLERANCE * wanted
        if abs(has - wanted) > tolerance:
            what = "cached floats per token" if match.quantity == "cache" else "parameters"
            raise TwofoldError(
                f"On task {task.name}, {variant.name} has {has} {what} and {match.variant}, which it says it matches, has {wanted}: "
                "change its heads or sizes, or drop the claim from its matches."
            )


def _named(where: str, make: Callable[[], Any]) -> Any:
    """What ``make`` gives; its error says where in the plan it arose."""
    try:
        return make()
    except TwofoldError as error:
        raise TwofoldError(f"In {where}: {error}") from error
    except TypeError as error:
        raise TwofoldError(f"In {where}: this does not fit together ({error}).") from error
