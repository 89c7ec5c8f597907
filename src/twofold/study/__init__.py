"""Studies: variants × seeds × tasks, declared in a small file, run on all cores, and read back as tables.

Nothing here imports torch; the modules that do (:mod:`twofold.study.expansion`, :mod:`twofold.study.worker`) run in processes of their own.
"""

from __future__ import annotations

from twofold.study.plan import StudyPlan, builtin, load_plan, names
from twofold.study.results import Results, TaskFacts

__all__ = ["Results", "StudyPlan", "TaskFacts", "builtin", "load_plan", "names"]
