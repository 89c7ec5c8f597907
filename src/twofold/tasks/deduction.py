"""Small deduction: implications in any order, and all that follows from one thing.

    c>d a>b d>e b>f ?abf⏎        from a follows b, and from that f

The facts are two chains of equal length with no letter in common; the answer is the rest of one of them. Each of its steps is a look-up of the
letter before, and where nothing follows it ends: so a model that is decoded writes its own premises, as one does who reasons step by step.
Chance is the share of questions that is right if the question is not read: somebody who can follow chains takes one of the letters that may be asked.
Relatives: ProofWriter and CLUTRR ask for more steps in words (arXiv:2012.13048, 1908.06177); the questions are this project's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from string import ascii_lowercase

from twofold.tasks.questions import Draws, Question, QuestionOptions, QuestionTask
from twofold.tasks.task import TaskKind


@dataclass(frozen=True, kw_only=True)
class DeductionOptions(QuestionOptions):
    """Each chain has ``chain`` letters of the first ``letters`` of the alphabet; ``min_steps`` to ``max_steps`` lead to its end, each number equally likely."""

    letters: int = 16
    chain: int = 3
    min_steps: int = 1
    max_steps: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("chain", 2 <= self.chain <= 13, "from 2 to 13")
        self.require("letters", 2 * self.chain <= self.letters <= 26, f"from {2 * self.chain}, for two chains, to 26")
        self.require("min_steps", 1 <= self.min_steps <= self.max_steps, f"from 1 to max_steps = {self.max_steps}")
        self.require("max_steps", self.max_steps < self.chain, f"less than chain = {self.chain}")

    def draw(self, draws: Draws) -> Question:
        """A question; the order of its facts does not make it another one."""
        chosen = draws.some_of(ascii_lowercase[: self.letters], 2 * self.chain)
        own, other = chosen[: self.chain], chosen[self.chain :]
        facts = [f"{a}>{b}" for chain in (own, other) for a, b in pairwise(chain)]
        steps = draws.between(self.min_steps, self.max_steps)
        asked = f"?{own[-1 - steps]}"
        return Question(
            prompt=f"{' '.join(draws.some_of(facts, len(facts)))} {asked}",
            answer="".join(own[-steps:]),
            key=f"{' '.join(sorted(facts))} {asked}",
            kind=f"steps_{steps}",
        )

    def chance(self, questions: Sequence[Question]) -> float:
        """One of the letters that may be asked, of either chain."""
        del questions
        return 1 / (2 * (self.max_steps - self.min_steps + 1))


KINDS = (
    TaskKind(
        name="deduction",
        summary="all that follows from one thing by chains of implications: scores for each number of steps",
        options=DeductionOptions,
        load=lambda options: QuestionTask(
            name="deduction",
            options=options,
            what=f"Two chains of {options.chain} letters, {options.min_steps} to {options.max_steps} steps",
        ),
    ),
)
