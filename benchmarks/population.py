"""Many small models: as one program on a GPU against one at a time, and by one process per core on a CPU against one process of all threads.

    python benchmarks/population.py            # a table, in about two minutes
    python benchmarks/population.py --json     # rows for programs

A population is checked to be its runs (same seeds, same losses) before anything is timed. What is timed are whole steps: batches made, moved, losses,
gradients, clipping, AdamW. On a GPU both sides are compiled, and the time of compiling is not counted. On a CPU the processes live
through all rounds, and take their turns in each: a ratio is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from rows import Row, in_turn, ratio, row, show
from twofold.models import build_model
from twofold.spec import GPT2_BLOCK, ModelSpec
from twofold.study.provenance import usable_cores
from twofold.task_spec import TaskSpec
from twofold.tasks import Task, load_task
from twofold.training.acceleration import accelerator_of
from twofold.training.optimizer import adamw
from twofold.training.spec import RunSpec, TrainingSpec
from twofold.training.stacked import Machine, Stack
from twofold.training.step import Stepper

LIST = {"length": 16, "train_size": 20_000, "held_out_size": 1}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """``models`` of a population of encoders of ``width``; ``steps`` of one model are a round's turn on a CPU, and of all models on a GPU."""

    width: int
    models: int
    steps: int
    layers: int = 2
    batch: int = 32


SHAPES = {
    "cuda": Shape(width=64, models=256, steps=20),
    "cpu": Shape(width=64, models=16, steps=64),
    # Says whether the benchmark works, and nothing about speed.
    "tiny": Shape(width=8, models=3, steps=3, layers=1, batch=2),
}
NARROW = 32
"""The width at which a population on a CPU is tried against one process per core."""


def run_of(shape: Shape, seed: int) -> RunSpec:
    """An encoder that turns lists around."""
    task = task_of()
    model = ModelSpec(
        tie="(Q, K=V)",
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=shape.width // 2,
        intermediate_size=4 * shape.width,
        **GPT2_BLOCK,
        **task.model_fields,
    )
    training = TrainingSpec(steps=1_000_000, batch_size=shape.batch, learning_rate=1e-3)
    return RunSpec(task=TaskSpec(name="reverse", options=LIST), model=model, training=training, seed=seed)


_LOADED: list[Task] = []


def task_of() -> Task:
    if not _LOADED:
        _LOADED.append(load_task(TaskSpec(name="reverse", options=LIST)))
    return _LOADED[0]


def alone(shape: Shape, seed: int, *, compiled: bool) -> Stepper:
    run = run_of(shape, seed)
    return Stepper(
        run, build_model(run.model, seed=seed), task_of(), accelerator_of(run.training), compile_model=compiled
    )


def together(shape: Shape, models: int, *, compiled: bool) -> Stack:
    runs = [run_of(shape, seed) for seed in range(models)]
    made = [build_model(run.model, seed=run.seed) for run in runs]
    device = accelerator_of(runs[0].training).device
    stack = Stack(runs, made, task_of(), Machine(device, compile_step=compiled))
    stack.load(made, [adamw(model, run.training) for model, run in zip(made, runs, strict=True)])
    return stack


def check_same_training(shape: Shape) -> None:
    """Losses of three models over five steps, together and alone, in float32."""
    stack, steppers = together(shape, 3, compiled=False), [alone(shape, seed, compiled=False) for seed in range(3)]
    for step in range(1, 6):
        losses, _ = stack.take(step)
        expected = torch.stack([stepper.take(step)[0] for stepper in steppers])
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


def stepping(taker: Stepper | Stack) -> Callable[[int], None]:
    """Take so many more steps, and wait for them to have been taken."""
    done = 0

    def take(steps: int) -> None:
        nonlocal done
        for _ in range(steps):
            done += 1
            loss, _ = taker.take(done)
        loss.sum().item()

    return take


def seconds_of(call: Callable[..., Any], *given: Any) -> float:
    began = time.perf_counter()
    call(*given)
    return time.perf_counter() - began


# On a GPU, in this process


def gpu_rows(name: str, rounds: int) -> list[Row]:
    shape = SHAPES[name]
    takers = {
        "one at a time": (stepping(alone(shape, 0, compiled=True)), 1),
        f"population of {shape.models}": (stepping(together(shape, shape.models, compiled=True)), shape.models),
    }
    speeds: dict[str, list[float]] = {side: [] for side in takers}
    for take, _ in takers.values():
        take(3)
    for index in range(rounds):
        for side in in_turn(list(takers), index):
            take, models = takers[side]
            speeds[side].append(models * shape.steps * tokens(shape) / seconds_of(take, shape.steps))
    one, many = takers
    what = f"encoders of width {shape.width}, speed"
    return [
        row(f"{what}, {many} / {one}, both compiled", ratio(speeds[many], speeds[one]), "ratio", ">= 50"),
        *speed_rows(what, speeds),
    ]


# On a CPU, in processes of their own


class Process:
    """A process of so many threads that takes steps of one model, or (``models`` > 0) of a population, when it is told to."""

    def __init__(self, name: str, width: int, *, models: int, threads: int) -> None:
        self.models = max(1, models)
        numbers = {"--width": width, "--models": models, "--threads": threads}
        given = [str(word) for pair in numbers.items() for word in pair]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "CUDA_VISIBLE_DEVICES": "",
            "ACCELERATE_USE_CPU": "true",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", "--shape", name, *given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def begin(self, steps: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()

    def wait(self) -> None:
        """Until the steps have been taken. Raises RuntimeError where the process has ended instead; what it said of that is on stderr."""
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "done\n":
            raise RuntimeError(f"A process that trains has ended with code {self._process.wait()}.")

    def end(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait()


def serve(shape: Shape, models: int, threads: int) -> None:
    """In a process of its own: read numbers of steps, take them, and say so."""
    torch.set_num_threads(threads)
    take = stepping(together(shape, models, compiled=False) if models else alone(shape, 0, compiled=False))
    take(2)
    print("done", flush=True)
    for line in sys.stdin:
        take(int(line))
        print("done", flush=True)


def cpu_rows(name: str, rounds: int) -> list[Row]:
    shape = SHAPES[name]
    narrow = min(NARROW, shape.width)
    many = f"population of {shape.models} in each of two processes, width {narrow}"
    groups = {
        "one process of two threads": [Process(name, shape.width, models=0, threads=2)],
        "two processes": [Process(name, shape.width, models=0, threads=1) for _ in range(2)],
        f"two processes, width {narrow}": [Process(name, narrow, models=0, threads=1) for _ in range(2)],
        many: [Process(name, narrow, models=shape.models, threads=1) for _ in range(2)],
    }
    try:
        speeds = measured(groups, shape, rounds)
    finally:
        for process in (one for group in groups.values() for one in group):
            process.end()
    one, two, narrow_two, _ = groups
    what = f"encoders of width {shape.width}, speed"
    return [
        row(f"{what}, {two} / {one}", ratio(speeds[two], speeds[one]), "ratio", ">= 1.3"),
        row(f"encoders, speed, {many} / {narrow_two}", ratio(speeds[many], speeds[narrow_two]), "ratio"),
        *speed_rows("encoders, speed", speeds),
    ]


def measured(groups: dict[str, list[Process]], shape: Shape, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each group in each round; all train as many models' steps, give or take a population's."""
    speeds: dict[str, list[float]] = {name: [] for name in groups}
    for process in (one for group in groups.values() for one in group):
        process.wait()
    for index in range(rounds):
        for name in in_turn(list(groups), index):
            group = groups[name]
            steps = max(1, 2 * shape.steps // (len(group) * group[0].models))
            began = time.perf_counter()
            for process in group:
                process.begin(steps)
            for process in group:
                process.wait()
            trained = len(group) * group[0].models * steps * tokens(shape)
            speeds[name].append(trained / (time.perf_counter() - began))
    return speeds


def tokens(shape: Shape) -> int:
    """Of one step of one model."""
    return shape.batch * LIST["length"]


def speed_rows(what: str, speeds: dict[str, list[float]]) -> list[Row]:
    return [row(f"{what}, {name}", statistics.median(values), "tokens/s") for name, values in speeds.items()]


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="measure there only (without it: on both, if there are both)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="turns of each side")
    parser.add_argument("--shape", choices=SHAPES, help="size of the models (without it: that of the device)")
    for hidden in ("--width", "--models", "--threads"):
        parser.add_argument(hidden, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: use --device cpu")
    if arguments.serve:
        shape = SHAPES[arguments.shape]
        serve(replace(shape, width=arguments.width), arguments.models, arguments.threads)
        return
    devices = [arguments.device] if arguments.device else ["cuda"] * torch.cuda.is_available() + ["cpu"]
    if devices == ["cpu"] and usable_cores() < 2:
        parser.error("two processes are compared with two threads: this needs two cores")
    rows = []
    for device in devices if usable_cores() > 1 else devices[:1]:
        name = arguments.shape or device
        check_same_training(SHAPES[name])
        rows += (gpu_rows if device == "cuda" else cpu_rows)(name, arguments.rounds)
    show(rows, as_json=arguments.json)


if __name__ == "__main__":
    main()
