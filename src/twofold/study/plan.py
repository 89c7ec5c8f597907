"""What a study is: a small declarative file, checked before anything runs.

A plan crosses variants (ties and the controls they must be read against) with seeds and tasks. All variants of a task share its data, the
order of the data, the seeds and the training settings; they differ in the fields of the model that they name. Torch is not needed here:
which fields a task dictates is asked when the plan is expanded into runs.
"""

from __future__ import annotations

import difflib
import itertools
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from twofold.errors import TwofoldError
from twofold.spec import ModelSpec
from twofold.training.spec import TrainingSpec

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=80)]
Seed = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Kind = Literal["tie", "control"]

MODEL_FIELDS = tuple(field.name for field in fields(ModelSpec))
TRAINING_FIELDS = tuple(field.name for field in fields(TrainingSpec))


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


def _known_fields(values: dict[str, Any], known: tuple[str, ...], what: str) -> dict[str, Any]:
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"its fields are {', '.join(known)}"
            raise ValueError(f"holds {name!r}, but {what} has no such field: {hint}")
    return values


class Match(_Section):
    """What a control shares with another variant: cached floats per token exactly, or parameters within 1%."""

    variant: Name
    quantity: Literal["cache", "parameters"] = Field(alias="in")


class Variant(_Section):
    """One way to attend: the fields in which its model differs from the study's."""

    name: Name
    label: str = ""
    kind: Kind = "tie"
    note: str = ""
    model: dict[str, Any] = {}
    matches: tuple[Match, ...] = ()

    @field_validator("model")
    @classmethod
    def _model_fields(cls, values: dict[str, Any]) -> dict[str, Any]:
        return _known_fields(values, MODEL_FIELDS, "a model")

    @model_validator(mode="after")
    def _a_control_says_why(self) -> Self:
        if self.kind == "control" and not self.note:
            raise ValueError("is a control without a note: say in note what it controls for")
        return self


class Settings(_Section):
    """What a task, or a point of a grid, changes: model fields, task options, training, and single variants' models."""

    model: dict[str, Any] = {}
    options: dict[str, Any] = {}
    training: dict[str, Any] = {}
    variant_models: dict[Name, dict[str, Any]] = {}

    @field_validator("model")
    @classmethod
    def _model_fields(cls, values: dict[str, Any]) -> dict[str, Any]:
        return _known_fields(values, MODEL_FIELDS, "a model")

    @field_validator("training")
    @classmethod
    def _training_fields(cls, values: dict[str, Any]) -> dict[str, Any]:
        return _known_fields(values, TRAINING_FIELDS, "training")

    @field_validator("variant_models")
    @classmethod
    def _variant_model_fields(cls, values: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {name: _known_fields(changes, MODEL_FIELDS, "a model") for name, changes in values.items()}


class Point(Settings):
    """One value of a grid's axis; its name becomes part of the names of the tasks."""

    name: Name


class Axis(_Section):
    """One axis of a grid: the grid is the product of its axes."""

    name: str
    points: tuple[Point, ...] = Field(min_length=1)


class TaskEntry(Settings):
    """A task with its options and what it changes; a grid makes several of it."""

    name: Name
    task: str
    title: str = ""
    variants: tuple[Name, ...] = ()
    grid: tuple[Axis, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PlannedTask:
    """A task after its grid has been worked out: one name, one set of changes. ``points`` is axis name -> point name."""

    name: str
    group: str
    title: str
    points: dict[str, str]
    task: str
    variants: tuple[str, ...]
    model: dict[str, Any]
    options: dict[str, Any]
    training: dict[str, Any]
    variant_models: dict[str, dict[str, Any]]


class StudyPlan(_Section):
    """A whole study; the built-in plans are examples.

    ``reference`` is the variant against which the others' differences are taken. ``grid`` multiplies every task by the product of its axes,
    as a task's own ``grid`` does for one. ``keep_models`` says whether a finished run's weights stay on disk: thousands of them are gigabytes.
    """

    name: Name
    title: str
    question: str
    reference: Name
    seeds: tuple[Seed, ...] = Field(min_length=1)
    keep_models: bool = True
    model: dict[str, Any] = {}
    training: dict[str, Any] = {}
    grid: tuple[Axis, ...] = ()
    variants: tuple[Variant, ...] = Field(min_length=1)
    tasks: tuple[TaskEntry, ...] = Field(min_length=1)

    @field_validator("model")
    @classmethod
    def _model_fields(cls, values: dict[str, Any]) -> dict[str, Any]:
        return _known_fields(values, MODEL_FIELDS, "a model")

    @field_validator("training")
    @classmethod
    def _training_fields(cls, values: dict[str, Any]) -> dict[str, Any]:
        return _known_fields(values, TRAINING_FIELDS, "training")

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        variants = [variant.name for variant in self.variants]
        _require_unique("seeds", self.seeds)
        _require_unique("variants", variants)
        for entry in self.tasks:
            _require_unique(f"the grid of task {entry.name}", [axis.name for axis in (*self.grid, *entry.grid)])
        _require_unique("tasks", [task.name for task in self.planned_tasks])
        _require_known("reference", self.reference, variants)
        for variant in self.variants:
            for match in variant.matches:
                _require_known(f"{variant.name}'s matches", match.variant, variants)
        for task in self.planned_tasks:
            for name in (*task.variants, *task.variant_models):
                _require_known(f"task {task.name}", name, variants)
            if self.reference not in task.variants:
                raise ValueError(
                    f"task {task.name} leaves out {self.reference}, the reference: add it to the task's variants"
                )
        return self

    @cached_property
    def planned_tasks(self) -> tuple[PlannedTask, ...]:
        """The tasks with all grids worked out, in the order of the file."""
        return tuple(planned for task in self.tasks for planned in _grid_of(self, task))

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
            for name, fields_changed in change.variant_models.items():
                variant_models[name] = variant_models.get(name, {}) | fields_changed
        yield PlannedTask(
            name="-".join((task.name, *(point.name for point in points))),
            group=task.name,
            title=", ".join((task.title or task.name, *(point.name for point in points))),
            points={axis.name: point.name for axis, point in zip(axes, points, strict=True)},
            task=task.task,
            variants=task.variants or tuple(variant.name for variant in plan.variants),
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
    "variants": Variant, "tasks": TaskEntry, "grid": Axis, "points": Point, "matches": Match,
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
