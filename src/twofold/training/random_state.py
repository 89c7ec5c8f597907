"""Randomness that is a function of where a run stands, so that no generator has a state worth saving.

The order of an epoch is drawn from (seed, epoch), the dropout of a step from (seed, step, process). A run that was killed draws after its
resumption what it would have drawn without, on any number of resumptions, and evaluating in between changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256

import torch


def seed_of(purpose: str, *parts: int) -> int:
    """A seed of 63 bits from a word and some numbers; different ones for all practical purposes where any of them differs."""
    text = ":".join([purpose, *map(str, parts)])
    return int.from_bytes(sha256(text.encode()).digest()[:8], "little") >> 1


def seed_device(device: torch.device, seed: int) -> None:
    """Seed what a model on ``device`` draws from."""
    if device.type in ("cpu", "cuda"):
        # torch.manual_seed would prepare to seed all kinds of devices there might be, which takes longer than a small model's step.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@contextmanager
def isolated_random_state(device: torch.device) -> Iterator[None]:
    """Leave the caller's random state on the CPU and on ``device`` as it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
