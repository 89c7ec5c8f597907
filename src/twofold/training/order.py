"""Which examples each step sees: permutations of the training data laid end to end, cut into batches.

The order depends on the seed and on the number of examples alone. All ties and controls of a seed therefore see the same batches in the same
order, and a run that is resumed knows from its step where it was.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.training.random_state import seed_of


class DataOrder:
    """Batch n holds the places n·B to (n+1)·B of the permutations of epochs 0, 1, 2 ..., B being ``batch_size``.

    A batch may begin in one epoch and end in the next, so every example is seen exactly once per epoch whatever B is.
    Raises TwofoldError where there is nothing to order.

    >>> order = DataOrder(seed=0, train_size=5, batch_size=3)
    >>> sorted(torch.cat([order.batch(0), order.batch(1)])[:5].tolist())
    [0, 1, 2, 3, 4]
    """

    def __init__(self, *, seed: int, train_size: int, batch_size: int) -> None:
        if train_size < 1:
            raise TwofoldError("The task has no training example: give it more data.")
        self.seed = seed
        self.train_size = train_size
        self.batch_size = batch_size
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def batch(self, number: int) -> Tensor:
        """Indices [B] of the examples of a batch, counted from 0."""
        place, end = number * self.batch_size, (number + 1) * self.batch_size
        parts = []
        while place < end:
            epoch, start = divmod(place, self.train_size)
            parts.append(self._order(epoch)[start : start + end - place])
            place += len(parts[-1])
        return torch.cat(parts)

    def digest(self, batches: int) -> str:
        """SHA-256 of the indices (as int64, little-endian) of that many batches from the first: equal exactly where runs saw the same examples in the same order."""
        found = hashlib.sha256()
        for number in range(batches):
            found.update(self.batch(number).numpy().astype("<i8").data)
        return found.hexdigest()

    def _order(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_of("data order", self.seed, epoch))
            self._permutation = torch.randperm(self.train_size, generator=generator)
            self._epoch = epoch
        return self._permutation
