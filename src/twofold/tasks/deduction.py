"""Small deduction: implications in any order, and whether one thing follows from another.

    c>d a>b d>e b>f a?f=y⏎        a > b > f        a?e=n⏎        no chain leads from a to e

The facts are two chains of equal length with no letter in common. A question names a letter and one that is ``min_steps`` to ``max_steps`` steps
ahead in the same chain (yes), or, equally often, one as far ahead in the other chain (no). So nothing but the chain tells: half of the answers are yes,
whatever the letters, the places of the facts, the number of steps, and where in its chain each of the two letters is. With ``backwards`` some of the
noes ask in the wrong order; then one who sees that nothing follows from a letter can guess better than that.
Relatives: ProofWriter and CLUTRR ask for more steps in words (arXiv:2012.13048, 1908.06177); the questions are this project's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from string import ascii_lowercase

from twofold.tasks.questions import Draws, Question, QuestionOptions, QuestionTask
from twofold.tasks.task import TaskKind

YES, NO = "y", "n"
PERCENT = 100


@dataclass(frozen=True, kw_only=True)
class DeductionOptions(QuestionOptions):
    """Each chain has ``chain`` letters of the first ``letters`` of the alphabet; a share ``backwards`` (in whole percent) of the noes has two letters of one chain in the wrong order."""

    letters: int = 16
    chain: int = 3
    min_steps: int = 1
    max_steps: int = 2
    backwards: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("chain", 2 <= self.chain <= 13, "from 2 to 13")
        self.require("letters", 2 * self.chain <= self.letters <= 26, f"from {2 * self.chain}, for two chains, to 26")
        self.require("min_steps", 1 <= self.min_steps <= self.max_steps, f"from 1 to max_steps = {self.max_steps}")
        self.require("max_steps", self.max_steps < self.chain, f"less than chain = {self.chain}")
        self.require("backwards", 0 <= self.backwards <= 1, "from 0 to 1")

    def draw(self, draws: Draws) -> Question:
        """A question; the order of its facts does not make it another one."""
        chosen = draws.some_of(ascii_lowercase[: self.letters], 2 * self.chain)
        own, other = chosen[: self.chain], chosen[self.chain :]
        facts = [f"{a}>{b}" for chain in (own, other) for a, b in pairwise(chain)]
        shuffled = draws.some_of(facts, len(facts))
        steps = draws.between(self.min_steps, self.max_steps)
        start = draws.below(self.chain - steps)
        first, second = own[start], own[start + steps]
        is_so, is_backwards = draws.below(2) == 1, draws.below(PERCENT) < self.backwards * PERCENT
        if not is_so:
            first, second = (second, first) if is_backwards else (first, other[start + steps])
        asked = f"{first}?{second}="
        return Question(
            prompt=f"{' '.join(shuffled)} {asked}",
            answer=YES if is_so else NO,
            key=f"{' '.join(sorted(facts))} {asked}",
            kind=f"steps_{steps}",
        )


KINDS = (
    TaskKind(
        name="deduction",
        summary="whether one thing follows from another by a chain of implications: scores for each number of steps",
        options=DeductionOptions,
        load=lambda options: QuestionTask(
            name="deduction",
            options=options,
            what=f"Two chains of {options.chain} letters, {options.min_steps} to {options.max_steps} steps",
        ),
    ),
)
