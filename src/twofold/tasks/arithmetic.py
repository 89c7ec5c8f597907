"""Sums whose digits carry.

    375+48=324⏎        423, its last digit first (``reverse_answer``), as one adds by hand

The depth of a sum is the length of its longest run of carries that feed one another: 0 for 12+34, 3 for 999+1. With more than two terms
it is that of the partial sum where it is largest.
Digits in reverse make a sum a local rule, and are how small transformers learn it (arXiv:2307.03381); the questions are this project's own.
"""

from __future__ import annotations

from dataclasses import dataclass

from twofold.tasks.questions import Draws, Question, QuestionOptions, QuestionTask
from twofold.tasks.task import TaskKind


@dataclass(frozen=True, kw_only=True)
class ArithmeticOptions(QuestionOptions):
    """``terms`` numbers of 1 to ``digits`` digits are added, or of exactly so many with ``padded``; every length is equally likely."""

    digits: int = 3
    terms: int = 2
    padded: bool = False
    reverse_answer: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("digits", 1 <= self.digits <= 9, "from 1 to 9")
        self.require("terms", 2 <= self.terms <= 9, "from 2 to 9")

    def draw(self, draws: Draws) -> Question:
        """A sum; the order of its terms does not make it another one."""
        terms = [
            draws.below(10 ** draws.between(self.digits if self.padded else 1, self.digits)) for _ in range(self.terms)
        ]
        width = self.digits if self.padded else 1
        answer = str(sum(terms))
        return Question(
            prompt="+".join(f"{term:0{width}d}" for term in terms) + "=",
            answer=answer[::-1] if self.reverse_answer else answer,
            key="+".join(str(term) for term in sorted(terms)),
            kind=f"depth_{max(carry_depth(sum(terms[:n]), terms[n]) for n in range(1, self.terms))}",
        )


def carry_depth(a: int, b: int) -> int:
    """How many carries follow one another, at most, when a and b (0 or more) are added by hand.

    >>> carry_depth(12, 34), carry_depth(15, 17), carry_depth(999, 1), carry_depth(505, 505)
    (0, 1, 3, 1)
    """
    carry = run = longest = 0
    while a or b or carry:
        carry = int(a % 10 + b % 10 + carry >= 10)
        run = run + 1 if carry else 0
        longest = max(longest, run)
        a, b = a // 10, b // 10
    return longest


KINDS = (
    TaskKind(
        name="arithmetic",
        summary="sums whose digits carry, written by hand: scores for each depth of carries",
        options=ArithmeticOptions,
        load=lambda options: QuestionTask(
            name="arithmetic",
            options=options,
            what=f"Sums of {options.terms} numbers of {'' if options.padded else 'up to '}{options.digits} digits, {'last digit first' if options.reverse_answer else 'first digit first'}",
        ),
    ),
)
