"""Where a run computes: Accelerate's choice of device, precision and processes, set up from the training's values."""

from __future__ import annotations

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.training.spec import TrainingSpec


def accelerator_of(spec: TrainingSpec) -> Accelerator:
    """An Accelerator of this process (or of its group, under ``accelerate launch``) that computes in ``spec.precision``.

    Accumulation is not left to Accelerate: it would weigh the parts of a batch alike, and they differ where parts hold different numbers of
    scored predictions. Raises TwofoldError where the device cannot compute so, or the batch does not split over the processes.
    """
    state = AcceleratorState._shared_state
    if state and state.get("_mixed_precision") != spec.precision:
        # One process may train several runs; Accelerate keeps the precision of the first for good.
        AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            mixed_precision=spec.precision,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
        )
    except ValueError as error:
        AcceleratorState._reset_state()
        raise TwofoldError(f"This machine cannot train in {spec.precision} ({error}): use another precision.") from None
    if spec.precision == "fp16" and accelerator.device.type == "cpu":
        raise TwofoldError("Training in fp16 needs a graphics processor, and this run has none: use bf16 or no.")
    part, processes = spec.batch_size // spec.accumulation_steps, accelerator.num_processes
    if part % processes:
        raise TwofoldError(
            f"{part} examples (batch_size / accumulation_steps) do not split over {processes} processes: "
            "change batch_size, accumulation_steps or the number of processes."
        )
    return accelerator


def on_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch's tensors on the device; to a CUDA device they travel while the processor goes on."""
    if device.type == "cuda":
        return {
            name: value if value.is_cuda else value.pin_memory().to(device, non_blocking=True)
            for name, value in batch.items()
        }
    return {name: value.to(device) for name, value in batch.items()}
