"""The learning rate of a step: a formula of the step, so there is no scheduler whose state would have to be saved."""

from __future__ import annotations

import math

from twofold.training.spec import TrainingSpec


def learning_rate(spec: TrainingSpec, step: int) -> float:
    """The rate that step ``step`` of ``spec.steps`` (counted from 1) uses.

    With N steps, w of warm-up, the peak η and the floor ε = η · min_learning_rate_ratio, and i = step − 1:

        i < w:     η · (i + 1) / w
        i ≥ w:     ε + (η − ε) · f(p)        p = max(0, i − b) / (N − b)

    "cosine": b = w and f(p) = (1 + cos πp) / 2. "constant_with_decay": b = max(w, N − round(N · decay_fraction)) and f(p) = 1 − p. The floor is
    where the line ends, at i = N: no step is spent on a rate of 0.

    >>> spec = TrainingSpec(steps=10, batch_size=1, learning_rate=1.0, warmup_steps=2, min_learning_rate_ratio=0.0)
    >>> [round(learning_rate(spec, step), 3) for step in (1, 2, 3, 7, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.038]
    """
    done, peak = step - 1, spec.learning_rate
    if done < spec.warmup_steps:
        return peak * step / spec.warmup_steps
    begin = spec.warmup_steps
    if spec.schedule == "constant_with_decay":
        begin = max(begin, spec.steps - round(spec.steps * spec.decay_fraction))
    progress = max(0, done - begin) / max(1, spec.steps - begin)
    shape = (1 + math.cos(math.pi * progress)) / 2 if spec.schedule == "cosine" else 1 - progress
    floor = peak * spec.min_learning_rate_ratio
    return floor + (peak - floor) * shape
