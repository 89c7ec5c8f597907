"""Training on a GPU: our attention kernel against PyTorch's, both ways, and a model of 300M by our trainer against forty lines of plain PyTorch.

    python benchmarks/train_gpu.py                             # a table
    python benchmarks/train_gpu.py --json > docs/results/train_gpu.json
    python benchmarks/train_gpu.py --shapes 16x16x1x64x2048    # sequences x KV heads x queries of each x head_dim x tokens
    python benchmarks/train_gpu.py --leave-out model           # no training of a whole model
    python benchmarks/train_gpu.py --tiles                     # which tiles would be faster than those that are chosen

Attention is causal, in bfloat16, forward and backward. Ours has one tensor for keys and values, or two, or one that turns as it is read; of PyTorch there
are the fused kernels with two tensors and with v = k, and with keys that were turned before. Every gradient is compared with float64 on a small part of the
shape before anything is timed. In each round all contenders run in turn, and a ratio is the median over rounds of the ratio within a round; the GPU waits a
little before each, so that the processor, which starts kernels, is ahead of it as in a large model. Peak memory is that of one call with all that it is given.

The model has a GPT-2's shape: 20 layers of width 1,024, 16 heads, 50,304 tokens, 16 texts of 2,048. The forty lines are those of ``step.py``; ours are the
steps of the trainer itself, with its data, its clipping and its look at every loss. Both are compiled, in bfloat16, by fused AdamW.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import step
from rows import Row, in_turn, left_out, ratio, row, shown
from twofold.kernels import Inputs, Mask, Rotation, reference, scaled_dot_product, triton_prefill, triton_prefill_launch
from twofold.kernels.triton import is_interpreting
from twofold.kernels.triton_prefill_plan import Tiles
from twofold.models import build_model
from twofold.task_spec import TaskSpec
from twofold.tasks.task import TableTask
from twofold.training.acceleration import accelerator_of
from twofold.training.spec import RunSpec, TrainingSpec
from twofold.training.step import LossLedger, Stepper

Pass = Callable[[], object]
Attend = Callable[[Inputs], Tensor]
SHAPES = ("16x16x1x64x2048", "4x16x1x128x4096", "1x8x4x128x8192", "2x8x1x256x4096")
TINY = ("1x1x2x16x40",)
FUSED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
MODEL = {**step.SHAPES["cuda"], "batch": 16}
# Says whether the benchmark works, and nothing about speed.
TINY_MODEL = {"width": 32, "layers": 1, "heads": 2, "vocabulary": 11, "context": 7, "batch": 2}
GOALS = {"(Q, K, V)": ">= 205000", "(Q, K=V)": ">= 215000"}
STEPS_OF_A_TURN = 5
HEAD_START_CYCLES = 10_000_000
"""Of the GPU's clock: some milliseconds."""


@dataclass(frozen=True)
class Shape:
    """Sequences, KV heads, query heads of each, dimensions of a head, tokens."""

    batch: int
    kv_heads: int
    group: int
    head_dim: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        return f"{self.batch}x{self.kv_heads}x{self.group}x{self.head_dim}x{self.tokens}"

    @property
    def small(self) -> Shape:
        """What is compared with float64."""
        return replace(self, batch=1, kv_heads=min(self.kv_heads, 2), tokens=min(self.tokens, 300))


@dataclass(frozen=True)
class Bench:
    """Where and how often: a GPU, or for a self-check Triton's interpreter on a CPU."""

    device: str
    rounds: int

    @property
    def is_real(self) -> bool:
        """Whether times and memory mean anything."""
        return self.device == "cuda"

    @property
    def first_round(self) -> int:
        """From a number below 0 on rounds are not counted: they compile, and make room."""
        return -2 if self.is_real else 0


# Attention


def call(shape: Shape, device: str, *, shares: bool = True, turns: bool = False) -> tuple[Inputs, Tensor]:
    """A call whose streams want gradients, as projections leave them in memory, and the gradient of its output."""
    draw = torch.Generator(device).manual_seed(0)

    def normal(heads: int) -> Tensor:
        size = (shape.batch, shape.tokens, heads, shape.head_dim)
        return torch.randn(size, dtype=torch.bfloat16, device=device, generator=draw).transpose(1, 2)

    heads = shape.kv_heads * shape.group
    query, key, gradient = normal(heads).requires_grad_(), normal(shape.kv_heads).requires_grad_(), normal(heads)
    value = key if shares else normal(shape.kv_heads).requires_grad_()
    pairs = shape.head_dim // 2
    frequencies = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64, device=device) / pairs)
    angles = torch.arange(shape.tokens, device=device)[:, None] * frequencies
    rotation = Rotation(cosine=angles.cos().bfloat16(), sine=angles.sin().bfloat16(), distance=pairs)
    inputs = Inputs(query=query, key=key, value=value, mask=Mask(causal=True), scale=shape.head_dim**-0.5)
    return replace(inputs, key_rotation=rotation if turns else None), gradient


def leaves(inputs: Inputs) -> list[Tensor]:
    """What has a gradient, once."""
    return list({id(tensor): tensor for tensor in (inputs.query, inputs.key, inputs.value)}.values())


def both_ways(attend: Attend, inputs: Inputs, gradient: Tensor) -> tuple[Tensor, ...]:
    """The gradients."""
    return torch.autograd.grad(attend(inputs), leaves(inputs), gradient)


def by_pytorch(backend: SDPBackend) -> Attend:
    """A fused kernel of PyTorch's, on keys that are turned before."""

    def attend(inputs: Inputs) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product.attend(inputs)

    return attend


def contenders(bench: Bench) -> dict[str, tuple[Attend, dict[str, bool]]]:
    """Ways to compute, and what they are given."""
    kinds = {"two tensors": {"shares": False}, "v = k": {}, "turned": {"turns": True}}
    made = {f"ours, {name}": (triton_prefill.attend, kind) for name, kind in kinds.items()}
    for backend, name in product(FUSED if bench.is_real else {"math": SDPBackend.MATH}, kinds):
        made[f"{backend}, {name}"] = (by_pytorch(FUSED.get(backend, SDPBackend.MATH)), kinds[name])
    return made


def check(attend: Attend, shape: Shape, device: str, kind: dict[str, bool]) -> None:
    """Raise AssertionError unless gradients are those of the reference in float64, up to bfloat16's rounding."""
    inputs, gradient = call(shape.small, device, **kind)
    wide = {id(tensor): tensor.detach().double().requires_grad_() for tensor in leaves(inputs)}
    exact = replace(inputs, **{name: wide[id(getattr(inputs, name))] for name in ("query", "key", "value")})
    if (rotation := inputs.key_rotation) is not None:
        tables = {"cosine": rotation.cosine.double(), "sine": rotation.sine.double()}
        exact = replace(exact, key_rotation=Rotation(**tables, distance=rotation.distance))
    wanted = both_ways(reference.attend, exact, gradient.double())
    for one, other in zip(both_ways(attend, inputs, gradient), wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0.05, atol=0.02 * float(other.abs().max()))


def timed(passes: dict[str, Pass], bench: Bench) -> dict[str, list[float]]:
    """Milliseconds of each in each round; on a GPU its own, between two events."""
    found: dict[str, list[float]] = {name: [] for name in passes}
    for index in range(bench.first_round, bench.rounds):
        for name in in_turn(list(passes), index):
            if bench.is_real:
                torch.cuda._sleep(HEAD_START_CYCLES)
            found[name].append(_milliseconds(passes[name], bench))
    return {name: times[-bench.rounds :] for name, times in found.items()}


def _milliseconds(run: Pass, bench: Bench) -> float:
    if not bench.is_real:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_bytes(attend: Attend, shape: Shape, kind: dict[str, bool]) -> int:
    """The most that one call holds, both ways: streams, output and gradients, and what is needed on the way."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    inputs, gradient = call(shape, "cuda", **kind)
    torch.cuda.reset_peak_memory_stats()
    both_ways(attend, inputs, gradient)
    return torch.cuda.max_memory_allocated() - before


def attention_rows(shape: Shape, bench: Bench) -> Iterator[Row]:
    """Times and memory of all contenders, and the ratios that goals are for."""
    given, passes, memory = contenders(bench), {}, {}
    for name, (attend, kind) in given.items():
        try:
            check(attend, shape, bench.device, kind)
            inputs, gradient = call(shape, bench.device, **kind)
            both_ways(attend, inputs, gradient)
            if bench.is_real:
                memory[name] = peak_bytes(attend, shape, kind)
        except (RuntimeError, AssertionError) as error:
            if name.startswith("ours"):
                raise
            left_out(f"{shape}, {name}", error)
            continue
        passes[name] = lambda attend=attend, inputs=inputs, gradient=gradient: both_ways(attend, inputs, gradient)
    times = timed(passes, bench)
    backends = list(dict.fromkeys(name.partition(", ")[0] for name in passes if not name.startswith("ours")))
    tensor_bytes = 2 * shape.batch * shape.kv_heads * shape.tokens * shape.head_dim
    for backend in backends:
        for ours, theirs in (
            ("v = k", "two tensors"),
            ("v = k", "v = k"),
            ("turned", "turned"),
            *[("two tensors",) * 2],
        ):
            goal = ">= 0.9" if backend == "flash" and (ours, theirs) == ("v = k", "two tensors") else None
            pair = f"ours, {ours}", f"{backend}, {theirs}"
            if pair[1] in times:
                speed = ratio(times[pair[1]], times[pair[0]])
                yield row(f"{shape}: speed, {pair[0]} / {pair[1]}", speed, "ratio", goal)
        if memory and f"{backend}, two tensors" in memory:
            less = (memory[f"{backend}, two tensors"] - memory["ours, v = k"]) / tensor_bytes
            goal = ">= 1" if backend == "flash" else None
            yield row(f"{shape}: peak memory, less than {backend} by", less, "tensors", goal)
    for name, one in times.items():
        yield row(f"{shape}: time, {name}", median(one), "ms")
    for name, bytes_ in memory.items():
        yield row(f"{shape}: peak memory, {name}", bytes_ / 2**20, "MiB")


# Tiles

CANDIDATES = {
    "forward": ((64, 128), (32, 64, 128), (4, 8), (2, 3, 4), (0, 128)),
    "query_gradient": ((64, 128), (32, 64, 128), (4, 8), (2, 3), (0, 128)),
    "stream_gradient": ((32, 64, 128), (64, 128), (4, 8), (2, 3), (0, 128)),
}


@contextmanager
def tiles_for(role: str, tiles: Tiles) -> Iterator[None]:
    """While it lasts, a kernel has these tiles; the others have theirs."""
    chosen = triton_prefill_launch.tiles_of

    def tiles_of(other: str, *given: Any, **named: Any) -> Tiles:
        return tiles if other == role else chosen(other, *given, **named)

    with mock.patch.object(triton_prefill_launch, "tiles_of", tiles_of):
        yield


def tiles_rows(shape: Shape, bench: Bench) -> Iterator[Row]:
    """What each kernel would take with other tiles than those that are chosen, which come first; the fastest ten."""
    for turns, role in product((False, True), CANDIDATES):
        inputs, gradient = call(shape, bench.device, turns=turns)
        attempts = {"as chosen": None, **{str(one): one for one in map(_tiles, product(*CANDIDATES[role]))}}
        found = {}
        for name, tiles in attempts.items():
            with tiles_for(role, tiles) if tiles else nullcontext():
                try:
                    run = _of_role(role, inputs, gradient)
                    found[name] = median(timed({name: run}, bench)[name])
                except Exception as error:  # noqa: BLE001 (tiles that do not fit, or that Triton cannot compile)
                    print(f"{shape}, {role}: {name} does not do ({str(error)[:80]})", file=sys.stderr)
        what = f"{shape}, {role}{', turned' if turns else ''}"
        best = sorted(found.items(), key=lambda one: (one[0] != "as chosen", one[1]))
        yield from (row(f"{what}: {name}", value, "ms") for name, value in best[:11])


def _tiles(numbers: tuple[int, ...]) -> Tiles:
    return Tiles(**dict(zip(("queries", "keys", "warps", "stages", "registers"), numbers, strict=True)))


def _of_role(role: str, inputs: Inputs, gradient: Tensor) -> Pass:
    rotation = inputs.key_rotation
    tables = (None, None) if rotation is None else (rotation.cosine[None], rotation.sine[None])
    streams = triton_prefill_launch.Streams(inputs.query.detach(), inputs.key.detach(), None, None, *tables, None, None)
    distance = 0 if rotation is None else rotation.distance
    settings = triton_prefill_launch.Settings(scale=inputs.scale, causal=True, window_tokens=0, distance=distance)
    if role == "forward":
        return lambda: triton_prefill_launch.run_forward(streams, settings)
    forward = (gradient, *triton_prefill_launch.run_forward(streams, settings))
    wants = (role == "query_gradient", role == "stream_gradient")
    return lambda: triton_prefill_launch.run_backward(streams, settings, forward, wants=wants)


# A whole model


def task_of(shape: dict[str, int]) -> TableTask:
    """Texts of tokens drawn at random."""
    ids = torch.randint(shape["vocabulary"], (8 * shape["batch"], shape["context"]), dtype=torch.int32)
    return TableTask(
        name="random tokens",
        train={"input_ids": ids, "labels": ids},
        held_out={"input_ids": ids[:1], "labels": ids[:1]},
        description="Tokens drawn at random.",
        tokens_per_example=shape["context"],
        model_fields={"architecture": "causal_lm"},
    )


def turn_of_trainer(tie: str, backend: str, shape: dict[str, int], bench: Bench) -> Pass:
    """Some steps of our trainer, its losses looked at once."""
    training = TrainingSpec(
        steps=1_000_000,
        batch_size=shape["batch"],
        learning_rate=1e-4,
        precision="bf16" if bench.is_real else "no",
    )
    run = RunSpec(task=TaskSpec(name="random tokens"), model=step.spec_of(shape, tie), training=training, seed=0)
    model = build_model(run.model, seed=0, backend=backend)
    stepper = Stepper(run, model, task_of(shape), accelerator_of(training), compile_model=bench.is_real)
    ledger, numbers = LossLedger(stepper), iter(range(1, training.steps))

    def turn() -> None:
        for number in (next(numbers) for _ in range(STEPS_OF_A_TURN)):
            ledger.add(number, *stepper.take(number))
        ledger.settle()
        ledger.known.clear()

    return turn


def turn_of_plain(shape: dict[str, int], bench: Bench) -> Pass:
    """As many of the forty lines."""
    one = step.step_of("plain", shape, bench.device, waits=False)

    def turn() -> None:
        for _ in range(STEPS_OF_A_TURN):
            one()

    return turn


def model_rows(bench: Bench) -> Iterator[Row]:
    """Positions a second, of each model the median over rounds, and what they are against the forty lines in the same rounds."""
    shape = MODEL if bench.is_real else TINY_MODEL
    step.check_same_function(shape)
    one = "auto" if bench.is_real else triton_prefill.NAME
    turns = {"plain": turn_of_plain(shape, bench)}
    for tie, backend in (("(Q, K, V)", "auto"), ("(Q, K=V)", one), ("(Q, K=V)", "sdpa")):
        name = f"ours {tie}" + (", sdpa" if backend == "sdpa" else "")
        turns[name] = turn_of_trainer(tie, backend, shape, bench)
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    rounds = max(1, bench.rounds // 4)
    for index in range(bench.first_round, rounds):
        for name in in_turn(list(turns), index):
            seconds[name].append(_milliseconds(turns[name], bench) / 1e3)
    seconds = {name: times[-rounds:] for name, times in seconds.items()}
    positions = STEPS_OF_A_TURN * shape["batch"] * shape["context"]
    for name, times in seconds.items():
        goal = GOALS.get(name.removeprefix("ours ")) if bench.is_real else None
        yield row(f"300M: positions a second, {name}", positions / median(times), "tokens/s", goal)
        if name != "plain":
            goal = ">= 1.0" if name == "ours (Q, K, V)" and bench.is_real else None
            yield row(f"300M: speed, {name} / plain", ratio(seconds["plain"], times), "ratio", goal)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="rows for programs")
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, help="instead of those that goals are for")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--leave-out", nargs="+", choices=["attention", "model"], default=[])
    parser.add_argument("--tiles", action="store_true", help="time tiles that are not chosen, and nothing else")
    parser.add_argument(
        "--self-check",
        action="store_true",
        help="tiny shapes on a CPU by Triton's interpreter, as tests run it: whether it works, and nothing about speed",
    )
    options = parser.parse_args(given)
    if options.self_check and not is_interpreting():
        parser.error("Triton's interpreter is off: set TRITON_INTERPRET=1 before Python starts")
    if not options.self_check and not torch.cuda.is_available():
        parser.error("there is no GPU here, and training on one is what is measured")
    bench = Bench("cpu", 1) if options.self_check else Bench("cuda", options.rounds)
    shapes = options.shapes or [Shape.parse(text) for text in (TINY if options.self_check else SHAPES)]
    with shown(as_json=options.json) as rows:
        for shape in shapes if options.tiles or "attention" not in options.leave_out else []:
            rows.extend((tiles_rows if options.tiles else attention_rows)(shape, bench))
        if not options.tiles and "model" not in options.leave_out:
            rows.extend(model_rows(bench))


if __name__ == "__main__":
    main()
