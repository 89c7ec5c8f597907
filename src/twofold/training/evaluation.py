"""Scores of a model on a task's held-out data, summed in float64 over batches and processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from twofold.errors import TwofoldError
from twofold.tasks import Task
from twofold.training.acceleration import on_device


def evaluate(
    model: nn.Module, task: Task, *, batch_size: int, accelerator: Accelerator | None = None
) -> dict[str, float]:
    """The task's scores of the model, which stays on its device and in its mode.

    With an ``accelerator`` the model computes in its precision, and each process takes every n-th batch. Raises TwofoldError where
    the task holds nothing out.
    """
    check_held_out(task)
    device = next(model.parameters()).device
    # Apple's processors have no float64: what is to be summed goes to the CPU.
    home = torch.device("cpu") if device.type == "mps" else device
    totals: dict[str, Tensor] = {}
    # Not inference_mode: a table that a model makes here and keeps could not be used in training after.
    with torch.no_grad(), _evaluating(model):
        for counts, batch in _share(task.held_out_batches(batch_size), accelerator):
            moved = on_device(batch, device)
            with nullcontext() if accelerator is None else accelerator.autocast():
                # Without labels: the model would compute a loss that nobody reads.
                logits = model(**{name: moved[name] for name in moved if name != "labels"}, use_cache=False).logits
            for name, value in task.measure(logits.to(home), on_device(moved, home)).items():
                measured = value.double() if counts else torch.zeros_like(value, dtype=torch.float64)
                totals[name] = totals[name] + measured if name in totals else measured
    sums = torch.stack([totals[name] for name in sorted(totals)])
    if accelerator is not None:
        sums = accelerator.reduce(sums, reduction="sum")
    return dict(task.scores(dict(zip(sorted(totals), sums.tolist(), strict=True))))


def check_held_out(task: Task) -> None:
    """Raise TwofoldError where there is nothing to measure on."""
    if task.held_out_size < 1:
        raise TwofoldError(
            f"The task {task.name} holds no data out, so nothing can be measured on it: give it more data."
        )


def _share(
    batches: Iterator[dict[str, Tensor]], accelerator: Accelerator | None
) -> Iterator[tuple[bool, dict[str, Tensor]]]:
    """Batches of this process; where it has none, one that does not count: all processes must come to the sum with the same names."""
    processes, rank = (1, 0) if accelerator is None else (accelerator.num_processes, accelerator.process_index)
    first: dict[str, Tensor] | None = None
    for number, batch in enumerate(batches):
        first = batch if number == 0 else first
        if number % processes == rank:
            first = None
            yield True, batch
    if first is not None:
        yield False, first


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
