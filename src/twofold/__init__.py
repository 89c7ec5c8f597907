"""Twofold: attention that needs fewer than three projections, where a variant is data and not code.

``import twofold`` is quick: a name is imported, and torch with it where it needs torch, when it is first used.

>>> import twofold
>>> twofold.Tie.parse("(Q, K=V)").cached_tensors
1
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from twofold._version import __version__ as __version__

if TYPE_CHECKING:
    from twofold.attention import Attention
    from twofold.cache import TiedCache
    from twofold.errors import TieError, TwofoldError
    from twofold.existing import halve, restore
    from twofold.models import (
        TwofoldConfig,
        TwofoldForCausalLM,
        TwofoldForImageClassification,
        TwofoldForTokenClassification,
        build_model,
        load_model,
    )
    from twofold.positions import (
        LearnedPositions,
        NoPositions,
        RelativeBiasPositions,
        RotaryPositions,
        SharedRotaryPositions,
    )
    from twofold.presets import PRESETS
    from twofold.spec import AttentionSpec, ModelSpec
    from twofold.study.plan import StudyPlan
    from twofold.study.results import Results
    from twofold.task_spec import TaskSpec
    from twofold.tasks import load_task
    from twofold.tie import Tie, TiePattern
    from twofold.training.evaluation import evaluate
    from twofold.training.spec import RunSpec, TrainingSpec
    from twofold.training.trainer import Outcome, train

__all__ = [
    "PRESETS",
    "Attention",
    "AttentionSpec",
    "LearnedPositions",
    "ModelSpec",
    "NoPositions",
    "Outcome",
    "RelativeBiasPositions",
    "Results",
    "RotaryPositions",
    "RunSpec",
    "SharedRotaryPositions",
    "StudyPlan",
    "TaskSpec",
    "Tie",
    "TieError",
    "TiePattern",
    "TiedCache",
    "TrainingSpec",
    "TwofoldConfig",
    "TwofoldError",
    "TwofoldForCausalLM",
    "TwofoldForImageClassification",
    "TwofoldForTokenClassification",
    "__version__",
    "build_model",
    "evaluate",
    "halve",
    "load_model",
    "load_task",
    "restore",
    "train",
]

# Where each public name lives. A function may not share its name with a module of the package: the module would hide it.
_HOMES = {
    "Attention": "attention",
    "AttentionSpec": "spec",
    "LearnedPositions": "positions",
    "ModelSpec": "spec",
    "NoPositions": "positions",
    "Outcome": "training.trainer",
    "PRESETS": "presets",
    "RelativeBiasPositions": "positions",
    "Results": "study.results",
    "RotaryPositions": "positions",
    "RunSpec": "training.spec",
    "SharedRotaryPositions": "positions",
    "StudyPlan": "study.plan",
    "TaskSpec": "task_spec",
    "Tie": "tie",
    "TieError": "errors",
    "TiePattern": "tie",
    "TiedCache": "cache",
    "TrainingSpec": "training.spec",
    "TwofoldConfig": "models",
    "TwofoldError": "errors",
    "TwofoldForCausalLM": "models",
    "TwofoldForImageClassification": "models",
    "TwofoldForTokenClassification": "models",
    "build_model": "models",
    "evaluate": "training.evaluation",
    "halve": "existing",
    "load_model": "models",
    "load_task": "tasks",
    "restore": "existing",
    "train": "training.trainer",
}
_MODULES = (
    "attention",
    "cache",
    "cost",
    "errors",
    "existing",
    "explain",
    "export",
    "kernels",
    "layouts",
    "models",
    "positions",
    "presets",
    "report",
    "spec",
    "study",
    "tasks",
    "tie",
    "training",
)


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of the package, when it is first asked for."""
    if name in _HOMES:
        value = getattr(import_module(f"twofold.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return import_module(f"twofold.{name}")
    raise AttributeError(f"module 'twofold' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
