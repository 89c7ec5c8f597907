"""A task that trains in a second, runs of it, and processes that carry them out and can be killed.

Examples hold different numbers of scored predictions, so that parts of a batch which are weighed alike would show.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twofold.spec import ModelSpec
from twofold.task_spec import TaskSpec
from twofold.tasks import Task
from twofold.training.spec import RunSpec, TrainingSpec
from twofold.training.trainer import train

FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
LENGTH = 12
VOCABULARY = 17
MODEL: dict[str, Any] = {
    "tie": "(Q, K=V)",
    "architecture": "causal_lm",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "vocab_size": VOCABULARY,
    "positions": {"kind": "rotary"},
    "dropout": 0.1,
}
TRAINING: dict[str, Any] = {"steps": 6, "batch_size": 8, "learning_rate": 1e-2, "log_every": 2}


class Progressions(Task):
    """x, x + d, x + 2d ... modulo 17; of each example the first two to seven terms are not scored."""

    loss_metric = "loss"

    def __init__(self, train_size: int = 40, held_out_size: int = 10) -> None:
        super().__init__(
            name="progressions",
            model_fields={"architecture": "causal_lm", "vocab_size": VOCABULARY, "causal": True},
            description="The next term.",
            train_size=train_size,
            held_out_size=held_out_size,
            tokens_per_example=LENGTH,
            data_hash=f"{train_size:032x}{held_out_size:032x}",
        )

    def train_batch(self, indices: Tensor) -> dict[str, Tensor]:
        start, difference, hidden = indices * 7 % VOCABULARY, 1 + indices % 16, 2 + indices % 6
        place = torch.arange(LENGTH)
        terms = (start[:, None] + difference[:, None] * place) % VOCABULARY
        return {"input_ids": terms, "labels": terms.masked_fill(place < hidden[:, None], -100)}

    def held_out_batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        for indices in torch.arange(self.train_size, self.train_size + self.held_out_size).split(batch_size):
            yield self.train_batch(indices)


def make_run(*, seed: int = 0, model: dict[str, Any] | None = None, **training: Any) -> RunSpec:
    """A run of Progressions; keywords change its training, ``model`` its model."""
    return RunSpec(
        task=TaskSpec(name="progressions"),
        model=ModelSpec.from_dict(MODEL | (model or {})),
        training=TrainingSpec(**(TRAINING | training)),
        seed=seed,
    )


class Unsteady(Progressions):
    """The same, until the count of a batch is no number: the ``bad_call``-th one asked for."""

    def __init__(self, bad_call: int) -> None:
        super().__init__()
        self.bad_call = bad_call

    def count(self, batch: dict[str, Tensor]) -> Any:
        self.bad_call -= 1
        return math.nan if self.bad_call == 0 else super().count(batch)


def carry_out(order: dict[str, Any]) -> None:
    """In a process of its own: the run ``order["run"]`` in ``order["folder"]``; by SIGKILL it ends at the ``order["dies_at"]``-th thing done to a file there."""
    os.environ.update(order.get("environment", {}))
    if order.get("dies_at"):
        die_at(order["folder"], order["dies_at"])
    try:
        train(RunSpec.from_dict(order["run"]), Path(order["folder"]), task=Progressions())
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def die_at(folder: str, number: int) -> None:
    """Kill this process just before it does the ``number``-th thing to a file or folder inside ``folder``."""
    left = number

    def count_down(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in FILE_EVENTS and str(arguments[0]).startswith(folder):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count_down)


class Nursery:
    """Processes that have everything imported when they begin: a parent that forks a child for each order it is given."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._parent = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, run: RunSpec, folder: Path, **order: Any) -> int:
        """Begin to carry out a run; the number of the process that does."""
        self._tell({"run": run.to_dict(), "folder": str(folder), **order})
        return int(self._hear())

    def wait(self, process: int) -> int:
        """Wait for the end of a process: 0, or what it failed with, or minus the signal that killed it."""
        self._tell({"wait": process})
        return int(self._hear())

    def carry_out(self, run: RunSpec, folder: Path, **order: Any) -> int:
        """Begin, and wait for the end."""
        return self.wait(self.start(run, folder, **order))

    def _tell(self, order: dict[str, Any]) -> None:
        assert self._parent.stdin is not None
        self._parent.stdin.write(json.dumps(order) + "\n")
        self._parent.stdin.flush()

    def _hear(self) -> str:
        assert self._parent.stdout is not None
        return self._parent.stdout.readline()

    def close(self) -> None:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.close()
        self._parent.wait()
        self._parent.stdout.close()


def serve() -> None:
    """The parent's side of :class:`Nursery`."""
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                try:
                    carry_out(order)
                    os._exit(0)
                except BaseException:  # noqa: BLE001
                    traceback.print_exc()
                    os._exit(1)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
