"""One model, some tasks of lm-evaluation-harness: scores with standard errors, and the chance level where it is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from twofold.errors import TwofoldError
from twofold.models.quiet import without_bars

SHARES = frozenset({"acc", "acc_norm", "exact_match"})
"""Metrics that are shares of right answers, for which a chance level has a meaning."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one task. ``error`` is the harness's standard error over its ``examples``, ``chance`` None where it is not known."""

    task: str
    metric: str
    value: float
    error: float
    examples: int
    chance: float | None


class Harness:
    """The tasks that were asked for, found once. Raises TwofoldError where the harness is not installed and for tasks that it does not have."""

    def __init__(self, tasks: Sequence[str], include: Path | None = None) -> None:
        self._library, self._models, managers = (
            _library(name) for name in ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks")
        )
        if include is not None and not include.is_dir():
            raise TwofoldError(f"{include} is no folder: --include names one that holds tasks of the harness.")
        path = None if include is None else str(include)
        self._manager = managers.TaskManager(include_path=path, include_defaults=False)
        if set(tasks) - set(self._manager.all_tasks):
            self._manager = managers.TaskManager(include_path=path)  # thousands of files
        missing = sorted(set(tasks) - set(self._manager.all_tasks))
        if missing:
            raise TwofoldError(
                f"lm-evaluation-harness has no task {', '.join(missing)}: see `lm-eval ls tasks`, or name a folder of your own with --include."
            )
        self._tasks = list(tasks)

    def scores(self, model: Any, tokenizer: Any, *, batch_size: int = 64, limit: int | None = None) -> list[Score]:
        """Of a causal language model, which stays where it is. ``limit`` examples of each task at most.

        Raises TwofoldError where a task's data cannot be had.
        """
        try:
            with without_bars():
                found = self._library.simple_evaluate(
                    model=self._models.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                    tasks=self._tasks,
                    task_manager=self._manager,
                    limit=limit,
                    bootstrap_iters=100,
                )
        except (OSError, LookupError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise TwofoldError(
                f"lm-evaluation-harness could not run {', '.join(self._tasks)} ({reason}): its own tasks need the network, or their data in the local cache."
            ) from None
        return [score for task, results in found["results"].items() for score in _scores(task, results, found)]


def _scores(task: str, results: Mapping[str, Any], found: Mapping[str, Any]) -> list[Score]:
    examples = int(found["n-samples"][task]["effective"]) if task in found["n-samples"] else 0
    told = []
    for key, value in results.items():
        metric, _, filtered = key.partition(",")
        error = results.get(f"{metric}_stderr,{filtered}")
        if isinstance(value, (int, float)) and isinstance(error, (int, float)):
            chance = _chance(task, found) if metric in SHARES else None
            told.append(Score(task=task, metric=metric, value=float(value), error=float(error), examples=examples, chance=chance))  # fmt: skip
    return told


def _chance(task: str, found: Mapping[str, Any]) -> float | None:
    """What the task's own file says, or the share that a guess among a question's choices gets."""
    config = found["configs"].get(task, {})
    said = (config.get("metadata") or {}).get("chance")
    if said is not None:
        return float(said)
    samples = found.get("samples", {}).get(task, [])
    if config.get("output_type") != "multiple_choice" or not samples:
        return None
    return sum(1 / len(sample["arguments"]) for sample in samples) / len(samples)


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise TwofoldError("lm-evaluation-harness is not installed: run pip install 'twofold[eval]'.") from None
