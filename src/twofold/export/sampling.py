"""Which token comes next, from logits. Numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twofold.errors import TwofoldError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """``do_sample`` False: the most likely token. True: drawn from softmax(logits / temperature), of the ``top_k`` most likely (0: of all)."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise TwofoldError(
                f"temperature is {self.temperature}, but logits are divided by it: use a positive number, or do_sample=False."
            )
        if self.top_k < 0:
            raise TwofoldError(f"top_k is {self.top_k}, but it counts tokens: use 0 for all of them.")

    def generator(self) -> np.random.Generator:
        """The source of the draws of one generation."""
        return np.random.default_rng(self.seed)

    def choose(self, logits: npt.NDArray[np.float32], generator: np.random.Generator) -> npt.NDArray[np.int64]:
        """Logits [B, N] -> tokens [B]."""
        if not self.do_sample:
            return np.asarray(logits.argmax(axis=-1))
        scaled = logits.astype(np.float64) / self.temperature
        if 0 < self.top_k < scaled.shape[-1]:
            least = np.partition(scaled, -self.top_k, axis=-1)[:, -self.top_k, None]
            scaled = np.where(scaled < least, -np.inf, scaled)
        # The largest of logits with Gumbel noise is a draw from their softmax.
        return np.asarray((scaled + generator.gumbel(size=scaled.shape)).argmax(axis=-1))
