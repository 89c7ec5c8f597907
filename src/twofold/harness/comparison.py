"""The models of a study's variants through the harness: for each tie its score, what chance alone would give, and what could have been seen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twofold.errors import TwofoldError
from twofold.harness.scoring import Score
from twofold.report.evidence import NOTHING, is_at_chance
from twofold.study.results import Results
from twofold.study.statistics import Interval, PairedDifference, detectable_difference, interval, paired_difference


@dataclass(frozen=True, kw_only=True)
class StudyModel:
    """A trained model of a study: its setting, variant and seed, and the folder that holds it."""

    setting: str
    variant: str
    label: str
    seed: int
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant on one metric of one task.

    ``error`` is the mean standard error over examples; ``detectable`` the smallest true difference from the reference that these seeds would
    have shown with a power of 0.8 (NaN: not known).
    """

    setting: str
    task: str
    metric: str
    variant: str
    label: str
    score: Interval
    error: float
    examples: int
    chance: float | None
    difference: PairedDifference
    detectable: float

    @property
    def at_chance(self) -> bool:
        """Whether the score is no more than guesses give; False where chance is not known."""
        return self.chance is not None and is_at_chance(self.score, self.chance, self.examples)


def study_models(results: Results) -> list[StudyModel]:
    """The models that a study kept, one for each result. Raises TwofoldError where there is none."""
    settings = {task.name: task.setting for task in results.plan.planned_tasks}
    runs = results.runs[(results.runs.status == "done") & (results.runs.purpose == "result")]
    found = [
        StudyModel(
            setting=settings[task],
            variant=variant,
            label=label,
            seed=int(seed),
            folder=results.folder / "runs" / task / variant / f"seed-{seed}" / "model",
        )
        for task, variant, label, seed in zip(runs.task, runs.variant, runs.label, runs.seed, strict=True)
    ]
    kept = [model for model in found if model.folder.is_dir()]
    if not kept:
        raise TwofoldError(
            f"{results.folder} holds no trained models: run the study, with keep_models = true, before its models are scored."
        )
    return kept


def compare(scored: Mapping[StudyModel, list[Score]], reference: str) -> Iterator[Row]:
    """A row for each setting, task, metric and variant, in the order in which they came; differences are paired by seed."""
    cells: dict[tuple[str, str, str], dict[str, dict[int, Score]]] = {}
    labels: dict[str, str] = {}
    for model, scores in scored.items():
        labels.setdefault(model.variant, model.label)
        for score in scores:
            of_variants = cells.setdefault((model.setting, score.task, score.metric), {})
            of_variants.setdefault(model.variant, {})[model.seed] = score
    for (setting, task, metric), of_variants in cells.items():
        base = _values(of_variants.get(reference, {}))
        for variant, by_seed in of_variants.items():
            first, values = next(iter(by_seed.values())), _values(by_seed)
            difference = paired_difference(values, base)
            shared = [values[seed] - base[seed] for seed in values if seed in base]
            yield Row(
                setting=setting, task=task, metric=metric, variant=variant, label=labels[variant],
                score=interval(list(values.values())), error=sum(s.error for s in by_seed.values()) / len(by_seed),
                examples=first.examples, chance=first.chance, difference=difference,
                detectable=_detectable(shared) if variant != reference else math.nan,
            )  # fmt: skip


def as_json(row: Row) -> dict[str, Any]:
    """JSON-ready; what has no value is NaN, which the printer makes null."""
    return {
        "setting": row.setting, "task": row.task, "metric": row.metric, "variant": row.variant, "label": row.label,
        "score": row.score.mean, "low": row.score.low, "high": row.score.high, "seeds": row.score.n,
        "standard_error": row.error, "examples": row.examples, "chance": row.chance, "at_chance": row.at_chance,
        "difference": row.difference.mean, "difference_low": row.difference.low, "difference_high": row.difference.high,
        "detectable": row.detectable,
    }  # fmt: skip


def _values(by_seed: Mapping[int, Score]) -> dict[int, float]:
    return {seed: score.value for seed, score in by_seed.items()}


def _detectable(differences: list[float]) -> float:
    """NaN where no two seeds differ: then nothing is known of how much they vary."""
    n = len(differences)
    if n < 2:
        return math.nan
    mean = sum(differences) / n
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1))
    return detectable_difference(deviation, n) if deviation > NOTHING else math.nan
