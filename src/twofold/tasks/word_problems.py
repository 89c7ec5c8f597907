"""Word problems in the format of GSM8K, from templates: a question, a line break, and the answer behind ``#### ``.

    Ann has 4 figs. Ann eats 1. Ann buys 5.⏎#### 8⏎
    Ann has 4 figs. Ann eats 1. Ann buys 5.⏎4-1=3 3+5=8 #### 8⏎        with ``working``, which then is scored too

Names, things and verbs are drawn; numbers stay from 0 to ``largest``. Problems with the same numbers and signs are one, whoever eats what: so a
held-out problem has a course of numbers that no training problem has.
Source of the format: "Training Verifiers to Solve Math Word Problems" (arXiv:2110.14168); the problems are this project's own, and far simpler.
"""

from __future__ import annotations

from dataclasses import dataclass

from twofold.tasks.questions import Draws, Question, QuestionOptions, QuestionTask
from twofold.tasks.task import TaskKind

NAMES = ("Ann", "Bob", "Cem", "Dee", "Eva", "Fay", "Gus", "Hal")
THINGS = ("figs", "nuts", "eggs", "cups", "pens", "hats", "keys", "toys")
GAINS = ("buys", "gets", "wins", "adds")
LOSSES = ("eats", "uses", "sells", "loses")
MARK = "#### "


@dataclass(frozen=True, kw_only=True)
class WordProblemsOptions(QuestionOptions):
    """``min_steps`` to ``max_steps`` gains and losses; every number is from 0 to ``largest``."""

    min_steps: int = 1
    max_steps: int = 2
    largest: int = 20
    working: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("min_steps", 1 <= self.min_steps <= self.max_steps, f"from 1 to max_steps = {self.max_steps}")
        self.require("max_steps", self.max_steps <= 8, "at most 8")
        self.require("largest", 2 <= self.largest <= 9_999, "from 2 to 9999")

    def draw(self, draws: Draws) -> Question:
        """A problem; what one begins with is 1 or more, and so is every change."""
        name, thing, has = draws.one_of(NAMES), draws.one_of(THINGS), draws.between(1, self.largest)
        told, working, course = [f"{name} has {has} {thing}."], list[str](), str(has)
        steps = draws.between(self.min_steps, self.max_steps)
        for _ in range(steps):
            is_gain = has < 1 or (has < self.largest and draws.below(2) == 1)
            by = draws.between(1, self.largest - has if is_gain else has)
            told.append(f"{name} {draws.one_of(GAINS if is_gain else LOSSES)} {by}.")
            step = f"{'+' if is_gain else '-'}{by}"
            before, has = has, has + by if is_gain else has - by
            working.append(f"{before}{step}={has} ")
            course += step
        prompt = " ".join(told) + "\n"
        return Question(
            prompt=prompt if self.working else prompt + MARK,
            answer="".join(working) + MARK + str(has) if self.working else str(has),
            key=course,
            kind=f"steps_{steps}",
        )


KINDS = (
    TaskKind(
        name="word-problems",
        summary="word problems of one or more steps in the format of GSM8K: scores for each number of steps",
        options=WordProblemsOptions,
        load=lambda options: QuestionTask(
            name="word-problems",
            options=options,
            what=f"Word problems of {options.min_steps} to {options.max_steps} steps, numbers up to {options.largest}{', with working' if options.working else ''}",
        ),
    ),
)
