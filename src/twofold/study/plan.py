"""What a study is: a small declarative file, checked before anything runs.

A plan crosses variants (ties and the controls they must be read against) with seeds and tasks. All variants of a task share its data, the
order of the data, the seeds and the training settings; they differ in the fields of the model that they name. Torch is not needed here:
which fields a task dictates is asked when the plan is expanded into runs.
"""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from twofold.errors import TwofoldError
from twofold.study.sections import (
    MODEL_FIELDS,
    TRAINING_FIELDS,
    Axis,
    Expect,
    Match,
    Name,
    Point,
    Section,
    Seed,
    Settings,
    TaskEntry,
    Variant,
    known_fields,
)


@dataclass(frozen=True, kw_only=True)
class PlannedTask:
    """A task after its grid has been worked out: one name, one set of changes.

    ``points`` is axis name -> point name, and ``tuned`` names the axes of which each variant is given its best point. ``setting`` and
    ``setting_title`` are name and title without those: what a report has a section of.
    """

    name: str
    group: str
    title: str
    points: dict[str, str]
    tuned: frozenset[str]
    setting: str
    setting_title: str
    task: str
    variants: tuple[str, ...]
    model: dict[str, Any]
    options: dict[str, Any]
    training: dict[str, Any]
    variant_models: dict[str, dict[str, Any]]

    @property
    def is_tuned(self) -> bool:
        """Whether it is one of several points from which each variant is given its best."""
        return bool(self.tuned)

    @property
    def untuned_points(self) -> dict[str, str]:
        """The points of the axes that are not tuned."""
        return {axis: point for axis, point in self.points.items() if axis not in self.tuned}


class StudyPlan(Section):
    """A whole study; the built-in plans are examples.

    ``reference`` is the variant against which the others' differences are taken. ``grid`` multiplies every task by the product of its axes,
    as a task's own ``grid`` does for one. ``keep_models`` says whether a finished run's weights stay on disk: thousands of them are gigabytes.
    ``tuning_seeds`` are those over which the points of tuned axes are compared; ``seeds`` are those of the results.
    """

    later = frozenset({"tuning_seeds"})

    name: Name
    title: str
    question: str
    reference: Name
    seeds: tuple[Seed, ...] = Field(min_length=1)
    tuning_seeds: tuple[Seed, ...] = ()
    keep_models: bool = True
    model: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)
    grid: tuple[Axis, ...] = ()
    variants: tuple[Variant, ...] = Field(min_length=1)
    tasks: tuple[TaskEntry, ...] = Field(min_length=1)

    @field_validator("model")
    @classmethod
    def _model_fields(cls, values: dict[str, Any]) -> dict[str, Any]:
        return known_fields(values, MODEL_FIELDS, "a model")

    @field_validator("training")
    @classmethod
    def _training_fields(cls, values: dict[str, Any]) -> dict[str, Any]:
        return known_fields(values, TRAINING_FIELDS, "training")

    @field_validator("variants")
    @classmethod
    def _families_are_their_members(cls, values: tuple[Variant, ...]) -> tuple[Variant, ...]:
        return tuple(member for variant in values for member in variant.members)

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        variants = [variant.name for variant in self.variants]
        families = [variant.family for variant in self.variants if variant.family]
        _require_unique("variants", [*variants, *dict.fromkeys(families)])
        _require_unique("tasks", [entry.name for entry in self.tasks])
        for entry in self.tasks:
            _require_unique(f"the grid of task {entry.name}", [axis.name for axis in (*self.grid, *entry.grid)])
            points = [point for axis in (*self.grid, *entry.grid) for point in axis.points]
            named = (name for part in (entry, *points) for name in part.variant_models)
            for name in (*entry.variants, *named):
                _require_known(f"task {entry.name}", name, [*variants, *families])
        _require_unique("tasks", [task.name for task in self.planned_tasks])
        _require_known("reference", self.reference, variants)
        for variant in self.variants:
            for match in variant.matches:
                _require_known(f"{variant.name}'s matches", match.variant, variants)
            if variant.expect:
                _require_known(f"{variant.name}'s expect", variant.expect.variant, variants)
        for task in self.planned_tasks:
            if self.reference not in task.variants:
                raise ValueError(
                    f"task {task.name} leaves out {self.reference}, the reference: add it to the task's variants"
                )
        return self

    @model_validator(mode="after")
    def _settings_are_told_apart(self) -> Self:
        """The names without tuned axes, which name the sections of a report, stand for one thing each."""
        settings = {task.setting: (task.group, task.untuned_points) for task in self.planned_tasks}
        for task in self.planned_tasks:
            if settings[task.setting] != (task.group, task.untuned_points):
                raise ValueError(
                    f"tasks holds {task.setting!r} twice, once as a task without its tuned axes: rename one"
                )
        return self

    @model_validator(mode="after")
    def _seeds_agree(self) -> Self:
        _require_unique("seeds", self.seeds)
        _require_unique("tuning_seeds", self.tuning_seeds)
        if self.tuning_seeds and not self.is_tuned:
            raise ValueError("has tuning_seeds, but no axis of a grid with tune = true: add one or leave them out")
        for variant in self.variants:
            for seed in self.all_seeds if variant.seed_shift else ():
                if seed + variant.seed_shift in self.all_seeds:
                    raise ValueError(
                        f"{variant.name}'s seed_shift of {variant.seed_shift} makes {seed} into {seed + variant.seed_shift}, which is a seed "
                        "of the study already: shift further"
                    )
        return self

    @cached_property
    def planned_tasks(self) -> tuple[PlannedTask, ...]:
        """The tasks with all grids worked out, in the order of the file."""
        return tuple(planned for task in self.tasks for planned in _grid_of(self, task))

    @cached_property
    def is_tuned(self) -> bool:
        """Whether any task has a tuned axis."""
        return any(task.is_tuned for task in self.planned_tasks)

    @property
    def choosing_seeds(self) -> tuple[int, ...]:
        """The seeds over which the points of tuned axes are compared; empty where there are none."""
        return (self.tuning_seeds or self.seeds[:1]) if self.is_tuned else ()

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """All seeds in the order in which they are run: those that choose come first."""
        return tuple(dict.fromkeys((*self.choosing_seeds, *self.seeds)))

    @property
    def run_count(self) -> int:
        """How many runs the study is: of a tuned task, every point at the seeds that choose, and one point at the others."""
        later = len(self.all_seeds) - len(self.choosing_seeds)
        single = sum(len(task.variants) * len(self.seeds) for task in self.planned_tasks if not task.is_tuned)
        tuned = sum(len(task.variants) * len(self.choosing_seeds) for task in self.planned_tasks if task.is_tuned)
        settings = {task.setting: len(task.variants) for task in self.planned_tasks if task.is_tuned}
        return single + tuned + later * sum(settings.values())

    def named(self, name: str) -> tuple[str, ...]:
        """The variants that a name stands for: itself, or a family's members."""
        return tuple(variant.name for variant in self.variants if variant.family == name) or (name,)

    def variant(self, name: str) -> Variant:
        """The variant of that name."""
        return next(variant for variant in self.variants if variant.name == name)

    @cached_property
    def plan_hash(self) -> str:
        """SHA-256 of the plan's canonical JSON."""
        return sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``StudyPlan.model_validate`` gives the same plan back."""
        return self.model_dump(mode="json", by_alias=True)


def _grid_of(plan: StudyPlan, task: TaskEntry) -> Iterator[PlannedTask]:
    axes = (*plan.grid, *task.grid)
    for points in itertools.product(*(axis.points for axis in axes)):
        changes: tuple[Settings, ...] = (task, *points)
        variant_models: dict[str, dict[str, Any]] = {}
        for change in changes:
            for family, fields_changed in change.variant_models.items():
                for name in plan.named(family):
                    variant_models[name] = variant_models.get(name, {}) | fields_changed
        kept = [point.name for axis, point in zip(axes, points, strict=True) if not axis.tune]
        # A point that is the only one of its axis tells no task from another, so titles leave it out.
        told = [(axis, point.name) for axis, point in zip(axes, points, strict=True) if len(axis.points) > 1]
        yield PlannedTask(
            name="-".join((task.name, *(point.name for point in points))),
            group=task.name,
            title=", ".join((task.title or task.name, *(name for _, name in told))),
            points={axis.name: point.name for axis, point in zip(axes, points, strict=True)},
            tuned=frozenset(axis.name for axis in axes if axis.tune),
            setting="-".join((task.name, *kept)),
            setting_title=", ".join((task.title or task.name, *(name for axis, name in told if not axis.tune))),
            task=task.task,
            variants=tuple(name for chosen in task.variants for name in plan.named(chosen))
            or tuple(variant.name for variant in plan.variants),
            model=_merge(*(change.model for change in changes)),
            options=_merge(*(change.options for change in changes)),
            training=_merge(plan.training, *(change.training for change in changes)),
            variant_models=variant_models,
        )


def _merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for layer in layers for name, value in layer.items()}


def _require_unique(what: str, names: Sequence[object]) -> None:
    for name in names:
        if list(names).count(name) > 1:
            raise ValueError(f"{what} holds {name!r} twice: give each its own")


def _require_known(where: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(f"{where} names {name!r}, which is no variant: use one of {', '.join(known)}")


# Reading a plan


def names() -> tuple[str, ...]:
    """The names of the built-in studies."""
    files = resources.files("twofold.study") / "builtin"
    return tuple(sorted(file.name.removesuffix(".toml") for file in files.iterdir() if file.name.endswith(".toml")))


def builtin(name: str) -> StudyPlan:
    """A built-in study. Raises TwofoldError for a name that is none."""
    if name not in names():
        raise TwofoldError(
            f"There is no built-in study {name!r}: use one of {', '.join(names())}, or the path of a file."
        )
    text = (resources.files("twofold.study") / "builtin" / f"{name}.toml").read_text(encoding="utf-8")
    return parse_plan(text, f"{name}.toml")


def load_plan(name_or_path: str | Path) -> StudyPlan:
    """A built-in study by name, or the study in a TOML or YAML file. Raises TwofoldError, one sentence that names file and field."""
    path = Path(name_or_path)
    if path.suffix not in {".toml", ".yaml", ".yml"}:
        if path.is_file():
            raise TwofoldError(
                f"{path} is neither TOML nor YAML by its name: a study's file ends in .toml, .yaml or .yml."
            )
        return builtin(str(name_or_path))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TwofoldError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    return parse_plan(text, str(path))


def parse_plan(text: str, file: str) -> StudyPlan:
    """The plan in ``text``, which is TOML or, if ``file`` ends so, YAML. Raises TwofoldError, one sentence that names file and field."""
    try:
        values = tomllib.loads(text) if file.endswith(".toml") else yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        what = "TOML" if file.endswith(".toml") else "YAML"
        raise TwofoldError(f"{file} is not {what}: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise TwofoldError(
            f"{file} holds no study: it must hold name, title, question, reference, seeds, variants and tasks."
        )
    try:
        return StudyPlan.model_validate(values)
    except ValidationError as error:
        raise TwofoldError(_sentence(file, values, error)) from None


_FIELDS_OF: Mapping[str, type[BaseModel]] = {
    "variants": Variant, "tasks": TaskEntry, "grid": Axis, "points": Point, "matches": Match, "expect": Expect,
}  # fmt: skip


def _sentence(file: str, values: dict[str, Any], error: ValidationError) -> str:
    """The first thing that is wrong: file, place, and the fix."""
    first = error.errors(include_url=False)[0]
    location, kind = first["loc"], first["type"]
    place = _place(values, location)
    if kind == "missing":
        return f"{file}: {place} is missing; add it."
    if kind == "extra_forbidden":
        sections = [_FIELDS_OF[str(part)] for part in location[:-1] if str(part) in _FIELDS_OF]
        known = [field.alias or name for name, field in (sections[-1] if sections else StudyPlan).model_fields.items()]
        return f"{file}: {place} is not known; the fields there are {', '.join(known)}."
    if kind == "value_error":
        return f"{file}: {place + ' ' if place else ''}{first['ctx']['error']}."
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{file}: {place} is {first['input']!r}, but {message.replace('input should', 'it should')}."


def _place(values: Any, location: Sequence[str | int]) -> str:
    """``variants[2] (gqa-2).kind``: a list's item is shown with its name, where it has one."""
    place = ""
    for part in location:
        try:
            values = values[part]
        except (LookupError, TypeError):
            values = None
        if isinstance(part, int):
            name = values.get("name") if isinstance(values, dict) else None
            place += f"[{part}]" + (f" ({name})" if name else "")
        else:
            place += f".{part}" if place else part
    return place
