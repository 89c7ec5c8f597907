"""Many models as one: their weights side by side, their steps one program.

All weights of a model are one row of a matrix [M, P], the matrices first and the vectors behind them, and so are AdamW's two moments. A step is
``torch.func``'s gradient of one model's loss, mapped over the rows, and AdamW written out for rows that each have a rate, betas, a decay and a clip
of their own. No row ever meets another: a model that diverges leaves the others as they are.

M models, P parameters of one (with zeros up to a multiple of 8), B examples, T tokens, N classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from transformers import PreTrainedModel

from twofold.models import build_model
from twofold.spec import ModelSpec
from twofold.tasks import IGNORED, Task
from twofold.tie import ROLES
from twofold.training.acceleration import on_device
from twofold.training.alike import program_of
from twofold.training.optimizer import decaying_names
from twofold.training.order import DataOrder
from twofold.training.schedule import learning_rate
from twofold.training.spec import RunSpec

ALIGNED = 8
"""A row's length is a multiple of this many floats, so that every model's matrices begin at aligned addresses."""

KERNEL = "folded"
"""The attention kernel of a population unless another is asked for: plain matrix products, which can be mapped over models on any device."""

MOMENTS = ("exp_avg", "exp_avg_sq")
EPSILON = 1e-8

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Machine:
    """Where and how a population computes. ``precision`` is that of a TrainingSpec, without fp16."""

    device: torch.device
    precision: str = "no"
    backend: str = "auto"
    compile_step: bool = False

    def autocast(self) -> torch.autocast:
        """The precision of matrix products. Nothing is cached: a cast that was made while mapping means nothing outside."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False)


class Stack:
    """The weights and moments of M models of one shape, and the program that trains and measures them."""

    def __init__(
        self, runs: Sequence[RunSpec], models: Sequence[PreTrainedModel], task: Task, machine: Machine
    ) -> None:
        self.runs, self.task, self.machine = runs, task, machine
        # Where learning rates differ and seeds do not, models share their batches.
        seeds = list(dict.fromkeys(run.seed for run in runs))
        sizes = {"train_size": task.train_size, "batch_size": runs[0].training.batch_size}
        self._orders = [DataOrder(seed=seed, **sizes) for seed in seeds]
        self._which = torch.tensor([seeds.index(run.seed) for run in runs], device=machine.device)
        self._one_each = len(seeds) == len(runs)
        self._layout = _Layout(models[0])
        self._roles = _Roles([run.model for run in runs])
        self._coefficients = self._roles.coefficients.to(machine.device, models[0].dtype)
        backend = KERNEL if machine.backend == "auto" else machine.backend
        program = program_of([run.model for run in runs])
        self._program = build_model(program, seed=0, backend=backend).to(machine.device, models[0].dtype)
        self._decays = self._layout.row({name: torch.ones(()) for name in decaying_names(models[0])}).to(
            self._coefficients
        )
        self._state = torch.stack([torch.zeros(len(runs), self._layout.length, dtype=models[0].dtype)] * 3).to(
            machine.device
        )
        self._warm: set[tuple[tuple[int, ...], ...]] = set()
        self._step = torch.compile(self._advance) if machine.compile_step else self._advance

    def order(self, index: int) -> DataOrder:
        """The order of the data of a model."""
        return self._orders[int(self._which[index])]

    def load(self, models: Sequence[PreTrainedModel], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Take over the weights of models and the moments of their optimisers (zero before the first step)."""
        rows = []
        for model, optimizer in zip(models, optimizers, strict=True):
            named = dict(model.named_parameters())
            moments = [
                {
                    name: optimizer.state[parameter][kind]
                    for name, parameter in named.items()
                    if parameter in optimizer.state
                }
                for kind in MOMENTS
            ]
            rows.append(
                torch.stack(
                    [self._layout.row(values) for values in ({n: p.detach() for n, p in named.items()}, *moments)]
                )
            )
        self._state.copy_(torch.stack(rows, dim=1))

    def unload(self, step: int) -> Iterator[Mapping[str, Mapping[str, Tensor]]]:
        """Of each model, on the CPU, the weights and AdamW's state as it is after ``step``: kind -> parameter -> tensor, each its own memory."""
        state = self._state.cpu()
        for index in range(len(self.runs)):
            kinds = {
                kind: {name: value.clone() for name, value in self._layout.named(state[number, index]).items()}
                for number, kind in enumerate(("weights", *MOMENTS))
            }
            yield kinds | {"step": {name: torch.tensor(float(step), dtype=torch.float32) for name in kinds["weights"]}}

    # Training

    def take(self, step: int) -> tuple[Tensor, Tensor]:
        """Take step ``step`` (counted from 1) of every model: losses [M], and norms [M] of the gradients; both still on the device."""
        parts, counts = self._parts(step)
        self._warm_up({name: value[0] for name, value in parts[0].items()})
        with self.machine.autocast():
            return self._step(self._state, parts, counts, self._numbers(step))

    def _parts(self, step: int) -> tuple[list[Batch], Tensor]:
        """The parts of every model's batch, [M, B, ...] each, and how many predictions each model's whole batch scores, [M]."""
        spec, models = self.runs[0].training, len(self._orders)
        indices = torch.stack([order.batch(step - 1) for order in self._orders]).view(
            models, spec.accumulation_steps, -1
        )
        counts, parts = torch.zeros(models, dtype=torch.int64), []
        for number in range(spec.accumulation_steps):
            batch = self.task.train_batch(indices[:, number].flatten())
            counts += (self.task.targets(batch) != IGNORED).view(models, -1).sum(1)
            parts.append(
                on_device(
                    {name: value.view(models, -1, *value.shape[1:]) for name, value in batch.items()},
                    self.machine.device,
                )
            )
        counts = counts.clamp(min=1).to(self._coefficients)
        if self._one_each:
            return parts, counts
        return [{name: value[self._which] for name, value in part.items()} for part in parts], counts[self._which]

    def _numbers(self, step: int) -> Tensor:
        """[7, M]: the numbers of this step's AdamW, in the order in which ``_advance`` takes them."""
        rows = []
        for run in self.runs:
            spec, rate = run.training, learning_rate(run.training, step)
            beta_1, beta_2 = spec.betas
            corrections = (1 - beta_1**step, 1 - beta_2**step)
            rows.append((rate, 1 - rate * spec.weight_decay, beta_1, beta_2, *corrections, spec.clip_norm or torch.inf))
        return torch.tensor(rows, dtype=torch.float64).T.to(self._coefficients)

    def _advance(self, state: Tensor, parts: list[Batch], counts: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        weights, first, second = state.unbind(0)
        of_rows = vmap(grad_and_value(self._loss))
        grads, losses = of_rows(weights, self._coefficients, parts[0], counts)
        for part in parts[1:]:
            more, loss = of_rows(weights, self._coefficients, part, counts)
            grads, losses = grads + more, losses + loss
        norms = torch.linalg.vector_norm(grads, dim=1)
        rate, decay, beta_1, beta_2, correction_1, correction_2, clip = (row[:, None] for row in numbers.unbind(0))
        grads = grads * (clip / (norms[:, None] + 1e-6)).clamp(max=1.0)
        first.lerp_(grads, 1 - beta_1)
        second.mul_(beta_2).add_((1 - beta_2) * grads * grads)
        weights.mul_(torch.where(self._decays > 0, decay, 1.0))
        weights.sub_(rate / correction_1 * first / (second.sqrt() / correction_2.sqrt() + EPSILON))
        return losses.detach(), norms

    def _loss(self, row: Tensor, coefficients: Tensor, batch: Batch, count: Tensor) -> Tensor:
        """Sum of the losses of one model's predictions / ``count``."""
        return self._call(row, coefficients, batch | {"num_items_in_batch": count}).loss

    def _call(self, row: Tensor, coefficients: Tensor, inputs: Mapping[str, Any]) -> Any:
        weights = self._roles.weights(self._layout.named(row), coefficients)
        return functional_call(self._program, weights, (), dict(inputs))

    # Measuring

    @torch.no_grad()
    def evaluate(self, batch_size: int) -> list[dict[str, float]]:
        """The task's scores of every model, as :func:`twofold.training.evaluation.evaluate` gives them of one."""
        device = self.machine.device
        home = torch.device("cpu") if device.type == "mps" else device
        totals: dict[str, Tensor] = {}
        for batch in self.task.held_out_batches(batch_size):
            moved = on_device(batch, device)
            inputs: dict[str, Any] = {name: value for name, value in moved.items() if name != "labels"}
            self._warm_up(inputs)
            with self.machine.autocast():
                logits = vmap(lambda row, rows: self._call(row, rows, inputs | {"use_cache": False}).logits)(  # noqa: B023
                    self._state[0], self._coefficients
                )
            at_home = on_device(moved, home)
            for name, value in vmap(lambda one: dict(self.task.measure(one, at_home)))(logits.to(home)).items():  # noqa: B023
                totals[name] = totals[name] + value.double() if name in totals else value.double()
        sums = torch.stack([totals[name] for name in sorted(totals)], dim=1).tolist()
        return [dict(self.task.scores(dict(zip(sorted(totals), row, strict=True)))) for row in sums]

    @torch.no_grad()
    def _warm_up(self, batch: Batch) -> None:
        """Have the program make its tables of positions outside of any mapping: what is made inside may not be kept."""
        shapes = tuple(tuple(value.shape[1:]) for value in batch.values())
        if shapes not in self._warm:
            self._warm.add(shapes)
            inputs = {name: value[:1] for name, value in batch.items() if name != "labels"}
            with self.machine.autocast():
                self._program(**inputs, use_cache=False)


class _Layout:
    """Where each parameter of a model is in its row."""

    def __init__(self, model: nn.Module) -> None:
        parameters = sorted(model.named_parameters(), key=lambda named: named[1].ndim < 2)
        self._shapes = {name: parameter.shape for name, parameter in parameters}
        sizes = [shape.numel() for shape in self._shapes.values()]
        self._sizes = [*sizes, -sum(sizes) % ALIGNED]
        self._starts = [0, *accumulate(sizes)]
        self._dtype = parameters[0][1].dtype
        self.length = sum(self._sizes)

    def row(self, values: Mapping[str, Tensor]) -> Tensor:
        """[P] on the CPU, with zeros for the parameters that are not given. A single number stands for a whole parameter."""
        row = torch.zeros(self.length, dtype=self._dtype)
        for start, (name, shape) in zip(self._starts, self._shapes.items(), strict=False):
            if name in values:
                row[start : start + shape.numel()] = values[name].flatten()
        return row

    def named(self, row: Tensor) -> dict[str, Tensor]:
        """Parameters by name, as parts of a row."""
        parts = row.split(self._sizes)
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self._shapes.items(), strict=False)}


class _Roles:
    """The weights of the program's roles from the free weights of models whose ties differ; the free weights themselves where they do not."""

    def __init__(self, models: Sequence[ModelSpec]) -> None:
        layers = range(models[0].num_hidden_layers)
        ties = [[model.tie.tie(layer) for layer in layers] for model in models]
        self._free = [tie.free_projections for tie in ties[0]]
        self._differ = any(of_model != ties[0] for of_model in ties)
        rows = [
            [[[*map(float, tie.row(role)), *[0.0] * (3 - tie.rank)] for role in ROLES] for tie in of_model]
            for of_model in ties
        ]
        self.coefficients = torch.tensor(rows, dtype=torch.float64)
        """[M, layers, roles, free projections], with zeros behind the last of a tie."""
        # Query heads may be more than KV heads; then no tie mixes their weights, which are of different shapes.
        self._used = self.coefficients.ne(0).any(dim=0).tolist()

    def weights(self, free: dict[str, Tensor], coefficients: Tensor) -> dict[str, Tensor]:
        """Every parameter of the program, of one model with ``coefficients`` [layers, roles, free projections]."""
        if not self._differ:
            return free
        made = dict(free)
        for layer, names in enumerate(self._free):
            prefix = f"trunk.layers.{layer}.attention."
            for kind in ("weight", "bias"):
                if f"{prefix}q_proj.{kind}" not in free:
                    continue
                of_free = [free[f"{prefix}{name.lower()}_proj.{kind}"] for name in names]
                for index, role in enumerate(ROLES):
                    terms = [
                        coefficients[layer, index, number] * one
                        for number, one in enumerate(of_free)
                        if self._used[layer][index][number]
                    ]
                    made[f"{prefix}{role.lower()}_proj.{kind}"] = sum(terms[1:], start=terms[0])
        return made
