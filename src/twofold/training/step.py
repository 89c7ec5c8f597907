"""One optimiser step on a batch that may be split into parts and over processes, exactly as if it were not.

The loss of a step is the sum over its scored predictions divided by their number n, whatever parts they come in. Each part's loss is therefore
divided by the n of the whole step, and gradients are added up: parts with few predictions count little, and the gradient of a split batch is
that of the whole one, up to rounding.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from twofold.errors import TwofoldError
from twofold.tasks import Task
from twofold.training.acceleration import on_device
from twofold.training.optimizer import adamw
from twofold.training.order import DataOrder
from twofold.training.random_state import seed_device, seed_of
from twofold.training.schedule import learning_rate
from twofold.training.spec import RunSpec


class LossOf(nn.Module):
    """A model that gives its loss alone: its logits stay inside, where nobody widens them to float32 once more, or gathers them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor], count: Tensor) -> Tensor:
        """Sum of the losses of the batch's predictions / ``count``."""
        return self.model(**batch, num_items_in_batch=count).loss


class Stepper:
    """Takes the steps of a run, in any order of calls the same ones: a step depends on the weights and its number alone."""

    def __init__(
        self, run: RunSpec, model: PreTrainedModel, task: Task, accelerator: Accelerator, *, compile_model: bool
    ) -> None:
        self.run = run
        self.task = task
        self.accelerator = accelerator
        self.order = DataOrder(seed=run.seed, train_size=task.train_size, batch_size=run.training.batch_size)
        self._module = accelerator.prepare_model(LossOf(model))
        self._loss = torch.compile(self._module) if compile_model else self._module
        self.parameters = list(model.parameters())
        self.optimizer = adamw(model, run.training)
        self._prepared = accelerator.prepare_optimizer(self.optimizer)

    def take(self, step: int) -> tuple[Tensor, Tensor]:
        """Take step ``step`` (counted from 1): this process's share of its loss, and the norm of its gradient; both still on the device."""
        seed = seed_of("step", self.run.seed, step, self.accelerator.process_index)
        seed_device(self.accelerator.device, seed)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.run.training, step)
        loss = self._gradients(self.parts(step))
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.run.training.clip_norm or math.inf)
        # Accelerate's own step is about fp16's loss scale, and slow beside a small model's.
        (self.optimizer if self.accelerator.scaler is None else self._prepared).step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def parts(self, step: int) -> list[dict[str, Tensor]]:
        """The parts of a step's batch, as far as they are this process's."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        indices = self.order.batch(step - 1).view(self.run.training.accumulation_steps, processes, -1)
        return [self.task.train_batch(part) for part in indices[:, rank]]

    def _gradients(self, parts: list[dict[str, Tensor]]) -> Tensor:
        device, processes = self.accelerator.device, self.accelerator.num_processes
        count = torch.full((), float(sum(self.task.count(part) for part in parts)), device=device)
        if processes > 1:
            count = self.accelerator.reduce(count, reduction="sum")
        count.clamp_(min=1.0)
        total: Tensor | None = None
        for number, part in enumerate(parts, start=1):
            last = number == len(parts)
            # Processes exchange gradients once per step, on the way back through its last part.
            with nullcontext() if last else self.accelerator.no_sync(self._module):
                loss = self._loss(on_device(part, device), count)
                # Processes average their gradients; the sum is wanted.
                self.accelerator.backward(loss * processes if processes > 1 else loss)
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total


@dataclass
class LossLedger:
    """Losses of the steps since the last line of the log: looked at seldom, since looking waits for the device, but every one of them."""

    stepper: Stepper
    known: list[float] = field(default_factory=list)
    gradient_norm: float = math.nan
    _pending: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)

    def add(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Note a step without looking at it."""
        self._pending.append((step, loss, norm))

    def settle(self) -> None:
        """Look at the steps noted. Raises TwofoldError, naming step and batch, for the first whose loss or gradient is not finite."""
        if not self._pending:
            return
        accelerator = self.stepper.accelerator
        losses = torch.stack([loss for _, loss, _ in self._pending])
        if accelerator.num_processes > 1:
            losses = accelerator.reduce(losses, reduction="sum")
        norms = torch.stack([norm.to(losses.dtype) for _, _, norm in self._pending])
        values = torch.stack([losses, norms]).tolist()
        for (step, _, _), loss, norm in zip(self._pending, *values, strict=True):
            # In fp16 a gradient that is not finite is ordinary: the step was left out and the loss scale halved.
            if not math.isfinite(loss) or (accelerator.scaler is None and not math.isfinite(norm)):
                raise not_finite(self.stepper.order, step, loss, norm)
            self.known.append(loss)
            self.gradient_norm = norm
        self._pending.clear()
        if accelerator.scaler is not None and accelerator.scaler.get_scale() < 1.0:
            raise TwofoldError(
                f"The gradients overflow fp16 whatever they are scaled by, up to step {step}: train in bf16. What was saved before is intact."
            )

    @property
    def mean(self) -> float:
        """Mean loss of the steps that are known."""
        return math.fsum(self.known) / len(self.known) if self.known else math.nan


def not_finite(order: DataOrder, step: int, loss: float, norm: float) -> TwofoldError:
    """The error of a run whose loss, or else the norm of its gradient, is not finite at a step: which examples it was on, and what to do."""
    what = f"The norm of the gradient is {norm}" if math.isfinite(loss) else f"The loss is {loss}"
    indices = order.batch(step - 1).tolist()
    first = (step - 1) * len(indices)
    shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return TwofoldError(
        f"{what} at step {step}, on the batch of places {first} to {first + len(indices) - 1} in the order of the data (examples {shown}): "
        "lower learning_rate or look at these examples; what was saved before is intact."
    )
