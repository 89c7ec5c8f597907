"""Held-out questions as local tasks of lm-evaluation-harness: a YAML file and a file of JSON lines for each.

The model goes on with a prompt, greedily, up to a line break, and what it wrote must be the answer: the event of which ``exact_match`` is
the share (see :mod:`twofold.tasks.questions`). One token more than the longest answer may be written, so that an answer that does not end is wrong.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from twofold.storage import write_text, writing
from twofold.study.plan import PlannedTask, StudyPlan
from twofold.task_spec import TaskSpec
from twofold.tasks import load_task
from twofold.tasks.questions import END, QuestionTask

PREFIX = "twofold_"


def harness_name(setting: str) -> str:
    """``twofold_list_functions``: the harness's name for a study's task."""
    return PREFIX + re.sub(r"\W+", "_", setting).lower()


def question_tasks(plan: StudyPlan) -> dict[str, QuestionTask]:
    """By setting, the tasks of a study that are questions and answers."""
    first: dict[str, PlannedTask] = {}
    for planned in plan.planned_tasks:
        first.setdefault(planned.setting, planned)
    loaded = {
        setting: load_task(TaskSpec(name=planned.task, options=planned.options)) for setting, planned in first.items()
    }
    return {setting: task for setting, task in loaded.items() if isinstance(task, QuestionTask)}


def write_questions(task: QuestionTask, name: str, folder: Path) -> Path:
    """Write NAME.yaml and NAME.jsonl into ``folder`` and return the first. The YAML file names the other by its whole path."""
    data = folder.resolve() / f"{name}.jsonl"
    lines = [
        json.dumps({"question": question.prompt, "answer": question.answer, "kind": question.kind})
        for question in task.questions
    ]
    told = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "generation_kwargs": {
            "until": [END],
            "max_gen_toks": 1 + max(len(question.answer) for question in task.questions),
            "do_sample": False,
        },
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0, "chance": task.chance, "data_hash": task.data_hash},
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(data, "".join(line + "\n" for line in lines))
        write_text(folder / f"{name}.yaml", yaml.safe_dump(told, sort_keys=False, allow_unicode=True))
    return folder / f"{name}.yaml"
