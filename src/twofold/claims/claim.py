"""A claim as data: what is said, by whom, and which results decide it, by which rule."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from twofold.errors import TwofoldError

Asker = Literal["paper", "authors later", "readers"]
Measure = Literal["loss difference", "relative loss difference", "score difference", "score", "cache ratio"]
Quantity = Literal["parameters", "cache bytes", "cached tensors"]

TOPICS = {
    "language": "Language models",
    "scale": "Scale, tokens and length",
    "cache": "Cache and speed",
    "lists": "Lists of digits and recall",
    "vision": "Vision",
    "reasoning": "Reasoning",
    "why": "Why it is said to work",
    "rivals": "Other ways to spend the same bytes",
    "conversion": "Converting trained models",
}
"""File name of the data -> heading; also the order in which claims are shown."""

RULES = ("above", "below", "between", "published", "perplexities")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rule(_Strict):
    """What a result must be; exactly one of the five. ``says`` names the check among others of the same claim.

    ``above``/``below`` t: confirmed where the whole interval lies beyond t, refuted where it lies on the other side. ``between`` [a, b]:
    confirmed where the interval lies within, refuted where it lies outside. ``published`` x, the size that was published: refuted where the
    interval leaves x out, confirmed where it holds x and not 0. ``perplexities`` [a, b] is the same for ln b / ln a - 1, the relative difference of
    the losses behind them, in percent. In all other cases nothing is decided.
    """

    above: float | None = None
    below: float | None = None
    between: tuple[float, float] | None = None
    published: float | None = None
    perplexities: tuple[float, float] | None = None
    says: str = ""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        given = [name for name in RULES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of {', '.join(RULES)}, but has {', '.join(given) or 'none'}")
        return self

    @property
    def size(self) -> float | None:
        """The size that was published, if the rule is about one."""
        if self.perplexities is None:
            return self.published
        before, after = map(math.log, self.perplexities)
        return 100 * (after / before - 1)


class StudyEvidence(Rule):
    """A number of a study's report. ``section`` is a pattern (``*`` stands for anything): every section that fits is a check of its own.

    A difference is ``variant`` minus ``against`` (empty: the study's reference). A relative loss difference is in percent of the mean loss of
    ``against``: how much longer a text's code becomes, whatever its unit. ``minus`` is
    another task, whose difference is subtracted seed by seed: does it grow from there to here? ``metric`` names another score than the section's own, as a column of
    runs.csv. ``only`` are the selectors with which this part of a large study is run. A difference between the scores of two that are both at chance
    decides nothing.
    """

    study: str
    section: str = "*"
    variant: str
    against: str = ""
    measure: Measure = "loss difference"
    minus: str = ""
    metric: str = ""
    only: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """What makes this result."""
        return " ".join(["twofold study run", self.study, *(f"--only {name}" for name in self.only)])


class RowEvidence(Rule):
    """A row of a benchmark, measured once: ``docs/results/BENCHMARK.json`` as ``benchmarks/BENCHMARK.py --json`` printed it."""

    benchmark: str
    row: str

    @property
    def command(self) -> str:
        """What makes this result."""
        return f"python benchmarks/{self.benchmark}.py --json > docs/results/{self.benchmark}.json"


class Doubt(_Strict):
    """Something true in the file of a value because of which it decides nothing; ``says`` is why."""

    at: tuple[str, ...]
    says: str


class ValueEvidence(Rule):
    """A value in any JSON file among the results: a number, or an object with ``mean`` or ``value``, ``low``, ``high`` and perhaps ``n``.

    ``at`` leads to it: keys of objects, and in lists the ``name``, ``variant`` or place (``0``, ``-1``) of an item. Where one of ``doubts`` is
    true, the value is shown and decides nothing.
    """

    file: str
    at: tuple[str, ...]
    what: str
    unit: str = ""
    is_difference: bool = True
    doubts: tuple[Doubt, ...] = ()
    command: str


class CountedEvidence(Rule):
    """What follows from the sizes of a model, counted here and now: a fact without chance.

    ``quantity`` of ``preset`` with the fields of ``model`` changed; with ``against``, the ratio to the preset with those fields changed.
    """

    preset: str
    model: dict[str, Any]
    quantity: Quantity
    against: dict[str, Any] | None = None
    tokens: int = 32768
    unit: str = ""

    @property
    def command(self) -> str:
        """What shows this result."""
        return f'twofold explain "{self.model.get("tie", "(Q, K, V)")}" --preset {self.preset} --tokens {self.tokens}'


def _kind(values: Any) -> str | None:
    kinds = {"study": "study", "benchmark": "benchmark", "file": "file", "preset": "preset"}
    return next((kind for name, kind in kinds.items() if name in values), None) if isinstance(values, dict) else None


Evidence = Annotated[
    Annotated[StudyEvidence, Tag("study")]
    | Annotated[RowEvidence, Tag("benchmark")]
    | Annotated[ValueEvidence, Tag("file")]
    | Annotated[CountedEvidence, Tag("preset")],
    Discriminator(_kind),
]


class Claim(_Strict):
    """One statement. ``short`` is at most a line of a table; ``test`` is the command that would test it where no evidence is named.

    ``note`` says what a reader must know of how it was tested here.
    """

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    short: str = Field(max_length=90)
    statement: str
    source: str
    asked_by: Asker
    note: str = ""
    test: str = ""
    evidence: tuple[Evidence, ...] = ()
    topic: str = ""

    @model_validator(mode="after")
    def _can_be_tested(self) -> Self:
        if self.evidence and self.test:
            raise ValueError("has evidence, whose commands are known: leave test out")
        return self


def parse(text: str, file: str, topic: str = "") -> tuple[Claim, ...]:
    """The claims of one file. Raises TwofoldError, naming file and claim, for what is no claim."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TwofoldError(f"{file} is not TOML: {' '.join(str(error).split())}.") from None
    claims = values.pop("claims", [])
    if values:
        raise TwofoldError(f"{file} holds {', '.join(values)}, but only [[claims]] are read.")
    return tuple(_claim({**one, "topic": topic}, file) for one in claims)


def _claim(values: Mapping[str, Any], file: str) -> Claim:
    try:
        return Claim.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "its evidence"
        what = first["msg"].removeprefix("Value error, ")
        raise TwofoldError(f"{file}: the claim {values.get('id')!r} is wrong at {place}: {what}.") from None


@cache
def load() -> tuple[Claim, ...]:
    """All claims, in the order in which they are shown. Raises TwofoldError where two have one id."""
    folder = resources.files("twofold.claims") / "data"
    claims: list[Claim] = []
    for topic in TOPICS:
        file = folder / f"{topic}.toml"
        claims += parse(file.read_text(encoding="utf-8"), f"{topic}.toml", topic)
    ids = [claim.id for claim in claims]
    for name in ids:
        if ids.count(name) > 1:
            raise TwofoldError(f"Two claims are called {name!r}: give each its own id.")
    return tuple(claims)
