"""Tasks: each file gives data, a loss and a score, made again byte for byte from a name and options.

A new task is one file with its options, its :class:`Task` and ``KINDS``, and its name in the tuple below.
"""

from __future__ import annotations

from collections.abc import Mapping

from twofold.errors import TwofoldError
from twofold.task_spec import TaskSpec
from twofold.tasks import (
    anomaly,
    arithmetic,
    automata,
    capacity,
    deduction,
    digits,
    images,
    induction,
    list_functions,
    mad,
    multihop,
    recall,
    relations,
    selective_copy,
    state_tracking,
    synthetic,
    text,
    word_problems,
)
from twofold.tasks.options import Options, near_miss, read_options
from twofold.tasks.task import IGNORED, Batch, Task, TaskKind

__all__ = ["IGNORED", "TASKS", "Batch", "Options", "Task", "TaskKind", "load_task"]

MODULES = (
    synthetic,
    recall,
    mad,
    selective_copy,
    induction,
    state_tracking,
    relations,
    multihop,
    automata,
    capacity,
    arithmetic,
    list_functions,
    deduction,
    word_problems,
    digits,
    images,
    anomaly,
    text,
)

TASKS: Mapping[str, TaskKind] = {kind.name: kind for module in MODULES for kind in module.KINDS}


def load_task(spec: TaskSpec) -> Task:
    """The task of that name with those options. Raises TwofoldError for an unknown name or option, and for data that cannot be had.

    >>> import torch
    >>> from twofold.task_spec import TaskSpec
    >>> load_task(TaskSpec(name="sort", options={"length": 4, "train_size": 8})).train_batch(torch.tensor([0]))["labels"].shape
    torch.Size([1, 4])
    """
    if spec.name not in TASKS:
        raise TwofoldError(
            f"There is no task {spec.name!r}{near_miss(spec.name, list(TASKS))}; the tasks are {', '.join(TASKS)}."
        )
    kind = TASKS[spec.name]
    return kind.load(read_options(kind.options, spec.options, spec.name))
