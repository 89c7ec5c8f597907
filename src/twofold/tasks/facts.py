"""What the tasks of facts and questions share: rings of names, and an accuracy for each kind of question.

Names in a ring are all alike: each stands once on either side of a fact, so who can only tell which names stand together, and not which
comes first, is wrong half of the time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from twofold.tasks.task import IGNORED, Batch, TableTask


class FactsTask(TableTask):
    """A language model's task of several kinds of questions: beside ``accuracy`` there is ``accuracy_KIND`` for each kind that is asked."""

    @abstractmethod
    def kind_masks(self, batch: Batch) -> Mapping[str, Tensor]:
        """Kind -> bool [B, T], True at the last token of a question of that kind. Kinds may overlap."""

    def measure(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """As every task, and of each kind how many questions there are and how many are answered right."""
        targets = self.targets(batch).to(logits.device)
        scored = targets != IGNORED
        right = (logits[:, :-1].argmax(-1) == targets) & scored
        found = super().measure(logits, batch)
        for kind, mask in self.kind_masks(batch).items():
            asked = mask[:, :-1].to(logits.device) & scored
            found[f"asked_{kind}"] = asked.double().sum()
            found[f"right_{kind}"] = (right & asked).double().sum()
        return found

    def scores(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Loss and accuracy of all questions, and the accuracy of each kind."""
        kinds = (name.removeprefix("asked_") for name in totals if name.startswith("asked_"))
        found = {f"accuracy_{kind}": totals[f"right_{kind}"] / totals[f"asked_{kind}"] for kind in kinds if totals[f"asked_{kind}"]}  # fmt: skip
        return super().scores(totals) | found


def rings(draws: np.random.RandomState, rows: int, count: int) -> np.ndarray:
    """int64 [rows, count]: of each of ``count`` things the one that comes next in a ring of all of them, every ring equally likely."""
    order = draws.random_sample((rows, count)).argsort(axis=1, kind="stable")
    following = np.empty_like(order)
    np.put_along_axis(following, order, np.roll(order, -1, axis=1), axis=1)
    return following
