"""The parts of a study's file: variants, tasks, grids, and what a control promises. Each is checked by itself; no torch."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    field_validator,
    model_serializer,
    model_validator,
)

from twofold.errors import TieError
from twofold.spec import ModelSpec
from twofold.tie import TiePattern
from twofold.training.spec import TrainingSpec

MAX_NAME = 80
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=MAX_NAME)]
Seed = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Kind = Literal["tie", "control"]
Quantity = Literal["cache", "parameters", "flops"]
Outcome = Literal["same", "worse"]

MODEL_FIELDS = tuple(field.name for field in fields(ModelSpec))
TRAINING_FIELDS = tuple(field.name for field in fields(TrainingSpec))


class Section(BaseModel):
    """A part of a study's file.

    Fields that came after the first studies were run (``later``) are written only where they say something, so that a plan that does
    not use them keeps its hash, and with it its results.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_unused(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        unused = {name for name in self.later if getattr(self, name) == type(self).model_fields[name].default}
        return {name: value for name, value in written.items() if name not in unused}


def known_fields(values: dict[str, Any], known: tuple[str, ...], what: str) -> dict[str, Any]:
    """``values``, whose names are all ``known``. Raises ValueError, with the nearest name, where one is not."""
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"its fields are {', '.join(known)}"
            raise ValueError(f"holds {name!r}, but {what} has no such field: {hint}")
    return values


class Match(Section):
    """What a control shares with another variant: cached floats per token exactly; parameters, or operations of training, within 1%."""

    variant: Name
    quantity: Quantity = Field(alias="in")


class Expect(Section):
    """What a control must show beside another variant: no difference (a negative control), or a larger loss (a positive one)."""

    variant: Name
    outcome: Outcome


class Variant(Section):
    """One way to attend: the fields in which its model differs from the study's.

    ``ties`` makes it a *family*: one variant for each tie, by whose name (``family``) tasks may speak of all of them. ``seed_shift`` is added
    to the seed with which a run is trained; the run is filed, and paired with others, under its own seed.
    """

    later = frozenset({"ties", "family", "seed_shift", "expect"})

    name: Name
    label: str = ""
    kind: Kind = "tie"
    note: str = ""
    model: dict[str, Any] = {}
    matches: tuple[Match, ...] = ()
    ties: tuple[str, ...] = ()
    family: str = ""
    seed_shift: int = Field(default=0, ge=0, lt=2**30, strict=True)
    expect: Expect | None = None

    @field_validator("model")
    @classmethod
    def _model_fields(cls, values: dict[str, Any]) -> dict[str, Any]:
        return known_fields(values, MODEL_FIELDS, "a model")

    @model_validator(mode="after")
    def _a_control_says_why(self) -> Self:
        if self.kind == "control" and not self.note:
            raise ValueError("is a control without a note: say in note what it controls for")
        if self.expect and self.kind != "control":
            raise ValueError('promises an outcome in expect, so it is a control: add kind = "control" and a note')
        return self

    @model_validator(mode="after")
    def _ties_agree(self) -> Self:
        if self.ties and (self.matches or self.expect):
            raise ValueError(
                "has ties, and matches or expect: what a control claims is of one model, so give it a variant of its own"
            )
        if self.ties and "tie" in self.model:
            raise ValueError("has ties and model.tie: leave one of them out")
        slugs = [tie_slug(tie) for tie in self.ties]
        for tie, slug in zip(self.ties, slugs, strict=True):
            if slugs.count(slug) > 1:
                raise ValueError(f"holds the tie {tie!r} twice, perhaps in other words: leave one out")
            if len(f"{self.name}-{slug}") > MAX_NAME:
                raise ValueError(
                    f"holds the tie {tie!r}, which is too long to be part of a name: give it a variant of its own"
                )
        return self

    @property
    def members(self) -> tuple[Variant, ...]:
        """The variants that a family stands for; a single variant stands for itself."""
        if not self.ties:
            return (self,)
        return tuple(
            self.model_copy(
                update={
                    "name": f"{self.name}-{tie_slug(tie)}",
                    "label": ", ".join(filter(None, (str(TiePattern.parse(tie)), self.label))),
                    "model": {**self.model, "tie": tie},
                    "ties": (),
                    "family": self.name,
                }
            )
            for tie in self.ties
        )


def tie_slug(tie: str) -> str:
    """A tie's canonical text as a part of a name; different ties have different ones. Raises ValueError for a text that is no tie.

    >>> tie_slug("(Q,K=V)"), tie_slug("V = Q - K"), tie_slug("(Q=K, V) | (Q, K, V)")
    ('Q.KV', 'V.is.Q-K', 'QK.V-then-Q.K.V')
    """
    try:
        text = str(TiePattern.parse(tie))
    except TieError as error:
        raise ValueError(f"holds {tie!r}, which is no tie: {error.sentence.rstrip('.')}") from None
    words = {" | ": "-then-", "; ": "-and-", " = ": ".is.", ", ": ".", "=": "", "*": "x", "(": "", ")": "", " ": ""}
    for sign, word in words.items():
        text = text.replace(sign, word)
    return text


class Settings(Section):
    """What a task, or a point of a grid, changes: model fields, task options, training, and single variants' models."""

    model: dict[str, Any] = {}
    options: dict[str, Any] = {}
    training: dict[str, Any] = {}
    variant_models: dict[Name, dict[str, Any]] = {}

    @field_validator("model")
    @classmethod
    def _model_fields(cls, values: dict[str, Any]) -> dict[str, Any]:
        return known_fields(values, MODEL_FIELDS, "a model")

    @field_validator("training")
    @classmethod
    def _training_fields(cls, values: dict[str, Any]) -> dict[str, Any]:
        return known_fields(values, TRAINING_FIELDS, "training")

    @field_validator("variant_models")
    @classmethod
    def _variant_model_fields(cls, values: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {name: known_fields(changes, MODEL_FIELDS, "a model") for name, changes in values.items()}


class Point(Settings):
    """One value of a grid's axis; its name becomes part of the names of the tasks."""

    name: Name


class Axis(Section):
    """One axis of a grid: the grid is the product of its axes. With ``tune``, each variant is given its best point of it."""

    later = frozenset({"tune"})

    name: str
    tune: bool = Field(default=False, strict=True)
    points: tuple[Point, ...] = Field(min_length=1)


class TaskEntry(Settings):
    """A task with its options and what it changes; a grid makes several of it."""

    name: Name
    task: str
    title: str = ""
    variants: tuple[Name, ...] = ()
    grid: tuple[Axis, ...] = ()
