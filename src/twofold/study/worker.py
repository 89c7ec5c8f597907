"""A worker: the process in which runs are trained, one after another. Started by :mod:`twofold.study.pool`, never by hand.

Commands come on standard input, answers go to standard output, a JSON object per line:

    {"command": "expand", "plan": {...}}        -> {"event": "expanded", "tasks": {...}, "entries": [...]} or {"event": "refused", "error"}
    {"command": "run", "run": RunSpec, "folder", "data_hash", "keep_model"}
                                                -> {"event": "progress", ...}, then {"event": "done"} or {"event": "failed", "error"}
    {"command": "run-many", "runs": [{"path", "run", "folder", "data_hash"}, ...], "keep_model"}
                                                -> progress, {"event": "ended", "path", "status", "error"} for each, then as above

The runs of "run-many" are alike, and trained as one program.

Whatever libraries print goes to the log. When the pipe of commands closes, whoever started this process is gone, even if it was killed with
SIGKILL, and the process ends at once, in the middle of whatever it does: a trainer's files survive that.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twofold.errors import TwofoldError
from twofold.lazy import Lazy
from twofold.study.expansion import TaskAnswer, expand
from twofold.study.plan import StudyPlan
from twofold.task_spec import TaskSpec
from twofold.training.progress import Progress
from twofold.training.spec import RunSpec

if TYPE_CHECKING:
    import torch

    from twofold import tasks
    from twofold.training import population, trainer
else:
    # Torch takes seconds to import: the pipe must be watched before that.
    torch, tasks, trainer = Lazy("torch"), Lazy("twofold.tasks"), Lazy("twofold.training.trainer")
    population = Lazy("twofold.training.population")

SECONDS_BETWEEN_REPORTS = 0.5

Say = Callable[[Mapping[str, Any]], None]


def main() -> None:
    """Serve until the pipe of commands closes."""
    say = partial(_say, _answers())
    commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(commands,), daemon=True).start()
    # Ctrl-C reaches the whole group of processes; the runner decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    say({"event": "ready", **_prepare()})
    while True:
        command = commands.get()
        _serve(command, say)


def _answers() -> int:
    """The descriptor of standard output, now ours alone: prints go to the log from here on."""
    own = os.dup(1)
    os.dup2(2, 1)
    return own


def _say(descriptor: int, values: Mapping[str, Any]) -> None:
    line = json.dumps(values).encode() + b"\n"
    while line:
        line = line[os.write(descriptor, line) :]


def _listen(commands: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in _lines(0):
        commands.put(json.loads(line))
    os._exit(0)


def _lines(descriptor: int) -> Iterator[bytes]:
    """Whole lines until the pipe closes. Not of ``sys.stdin``: Python aborts if it ends while a thread waits inside that."""
    rest = b""
    while chunk := os.read(descriptor, 1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines


def _prepare() -> dict[str, Any]:
    """Import what training needs, and say what it will compute on and how much memory is free there (of a graphics processor)."""
    _ = trainer.train, tasks.load_task
    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(0), "memory_bytes": torch.cuda.mem_get_info()[0]}
    torch.set_num_threads(1)
    return {"device": "cpu", "memory_bytes": 0}


def _serve(command: Mapping[str, Any], say: Say) -> None:
    refusal = "refused" if command["command"] == "expand" else "failed"
    try:
        if command["command"] == "expand":
            facts, entries = expand(StudyPlan.model_validate(command["plan"]), ask, command["needed"])
            told = {name: asdict(fact) for name, fact in facts.items()}
            say({"event": "expanded", "tasks": told, "entries": [asdict(entry) for entry in entries]})
        elif command["command"] == "run-many":
            _run_many(command, say)
            say({"event": "done"})
        else:
            _run(command, say)
            say({"event": "done"})
    except TwofoldError as error:
        say({"event": refusal, "error": str(error)})
    except Exception as error:  # noqa: BLE001 - one run's error, whatever it is, must not end the study
        traceback.print_exc()
        say({"event": refusal, "error": _sentence(error)})


def _run(command: Mapping[str, Any], say: Say) -> None:
    run, folder = RunSpec.from_dict(command["run"]), Path(command["folder"])
    trainer.train(run, folder, task=_same_task(run.task, command["data_hash"]), report=_throttled(say))
    _tidy(folder, keep_model=command["keep_model"])


def _run_many(command: Mapping[str, Any], say: Say) -> None:
    orders = command["runs"]
    runs, folders = [RunSpec.from_dict(order["run"]) for order in orders], [Path(order["folder"]) for order in orders]
    for run, order in zip(runs, orders, strict=True):
        task = _same_task(run.task, order["data_hash"])  # one for all, since they are alike
    endings = population.train_population(runs, folders, task=task, report=_throttled(say))
    for order, folder, ending in zip(orders, folders, endings, strict=True):
        failed = isinstance(ending, TwofoldError)
        if not failed:
            _tidy(folder, keep_model=command["keep_model"])
        status, error = ("failed", str(ending)) if failed else ("done", "")
        say({"event": "ended", "path": order["path"], "status": status, "error": error})


def _same_task(spec: TaskSpec, data_hash: str) -> tasks.Task:
    """The task. Raises TwofoldError where its data are not those of this hash."""
    task = _task(spec)
    if task.data_hash != data_hash:
        raise TwofoldError(
            f"The data of task {spec.name} are not those with which the study was begun "
            f"(hash {task.data_hash[:12]}, then {data_hash[:12]}): begin again in a new folder."
        )
    return task


def _tidy(folder: Path, *, keep_model: bool) -> None:
    """A finished run needs its checkpoints no more."""
    for name in ("checkpoints",) if keep_model else ("checkpoints", "model"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _throttled(say: Say) -> Callable[[Progress], None]:
    last = -SECONDS_BETWEEN_REPORTS

    def report(progress: Progress) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= SECONDS_BETWEEN_REPORTS:
            last = now
            say({"event": "progress", **asdict(progress)})

    return report


def ask(spec: TaskSpec) -> TaskAnswer:
    """What the task says of itself."""
    task = _task(spec)
    return TaskAnswer(
        model_fields=dict(task.model_fields), description=task.description, loss_metric=task.loss_metric, score=task.score,
        higher_is_better=task.higher_is_better, train_size=task.train_size, tokens_per_example=task.tokens_per_example,
        data_hash=task.data_hash, held_out_size=task.held_out_size, chance=task.chance,
    )  # fmt: skip


def _task(spec: TaskSpec) -> tasks.Task:
    return _loaded(spec.name, json.dumps(dict(spec.options), sort_keys=True))


# A study goes from task to task and comes back with the next seed.
@lru_cache(maxsize=4)
def _loaded(name: str, options: str) -> tasks.Task:
    return tasks.load_task(TaskSpec(name=name, options=json.loads(options)))


def _sentence(error: Exception) -> str:
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line or 'no message'} (the worker's log in the study's folder logs/ holds the whole trace)."


if __name__ == "__main__":
    main()
