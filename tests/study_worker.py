"""A worker that speaks like the real one and trains nothing: what the runner does with good and bad workers, in milliseconds.

Every run is noted in calls.txt of the study's folder. A variant's name says what befalls its runs: "bad" fails, "dies" kills the process, "slow" takes
STUDY_WORKER_SECONDS, and all others are done at once. The data of the task STUDY_WORKER_LACKS are not there.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue

import study_fixture
from twofold.errors import TwofoldError
from twofold.study.expansion import TaskAnswer, expand
from twofold.study.plan import StudyPlan
from twofold.study.worker import _listen
from twofold.task_spec import TaskSpec


def say(**values: object) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def ask(spec: TaskSpec) -> TaskAnswer:
    if spec.name == os.environ.get("STUDY_WORKER_LACKS"):
        raise TwofoldError(f"There is no folder data/{spec.name}.")
    return study_fixture.ask(spec)


def expand_plan(command: dict) -> None:
    try:
        tasks, entries = expand(StudyPlan.model_validate(command["plan"]), ask, command["needed"])
    except TwofoldError as error:
        say(event="refused", error=str(error))
        return
    facts = {name: asdict(fact) for name, fact in tasks.items()}
    say(event="expanded", tasks=facts, entries=[asdict(entry) for entry in entries])


def run_many(command: dict) -> None:
    with (Path(command["runs"][0]["folder"]).parents[3] / "populations.txt").open("a") as populations:
        populations.write(f"{len(command['runs'])}\n")
    for order in command["runs"]:

        def tell(event: str, *, path: str = order["path"], error: str = "", **values: object) -> None:
            if event == "progress":
                say(event=event, **values)
            else:
                say(event="ended", path=path, status=event, error=error)

        run(order, tell)
    say(event="done")


def run(command: dict, say: Callable[..., None] = say) -> None:
    folder = Path(command["folder"])
    study, path = folder.parents[3], folder.relative_to(folder.parents[2]).as_posix()
    with (study / "calls.txt").open("a") as calls:
        calls.write(f"{path}\n")
    (folder / "run.json").write_text(json.dumps(command["run"]))
    variant = folder.parent.name
    if os.environ.get("STUDY_WORKER_FAILS", " ") in path:
        say(event="failed", error="The loss is NaN at step 3.")
        return
    progress = {"step": 50, "steps": 200, "tokens": 100, "loss": 2.0, "seconds": 0.1, "tokens_per_second": 1e3}
    say(event="progress", **progress, seconds_left=0.3, scores={})
    if variant == "slow":
        time.sleep(float(os.environ["STUDY_WORKER_SECONDS"]))
    if variant == "bad":
        say(event="failed", error="The loss is NaN at step 7.")
    elif variant == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        # As if a rate four times as high were best for "tied", and this one for the others.
        rate = command["run"]["training"]["learning_rate"] / (4e-3 if variant == "tied" else 1e-3)
        scores = {"loss": 1.0, "bits_per_byte": 1.5 + abs(math.log2(rate))}
        outcome = {"scores": scores, "parameters": 1, "seconds": 0.1, "tokens": 400}
        (folder / "outcome.json").write_text(json.dumps(outcome))
        say(event="done")


def main() -> None:
    commands: SimpleQueue = SimpleQueue()
    threading.Thread(target=_listen, args=(commands,), daemon=True).start()
    if "STUDY_WORKER_BROKEN" in os.environ:
        sys.exit("ImportError: libtorch.so is missing")
    sys.stdout.write("a library's stray print\n")
    memory = int(os.environ.get("STUDY_WORKER_MEMORY", "0"))
    say(event="ready", device=os.environ.get("STUDY_WORKER_DEVICE", "cpu"), memory_bytes=memory)
    serve = {"expand": expand_plan, "run": run, "run-many": run_many}
    while True:
        command = commands.get()
        serve[command["command"]](command)


if __name__ == "__main__":
    main()
