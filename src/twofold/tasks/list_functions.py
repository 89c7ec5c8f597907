"""Functions of lists, one on the result of another.

    max 3142=4⏎        reverse sort 3142=4321⏎        count tail 3142=3⏎

A list is written as its digits. ``reverse``, ``sort``, ``tail`` (all but the first) and ``swap`` (the first and the last change places) give lists;
``max``, ``min``, ``first``, ``last`` and ``count`` give a digit. The function next to the list is applied first.
The questions are this project's own; relatives are the paper's list tasks (see :mod:`twofold.tasks.synthetic`), which ask for one function at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from twofold.tasks.questions import Draws, Question, QuestionOptions, QuestionTask
from twofold.tasks.task import TaskKind

Digits = list[int]

TO_LISTS: Mapping[str, Callable[[Digits], Digits]] = {
    "reverse": lambda digits: digits[::-1],
    "sort": sorted,
    "tail": lambda digits: digits[1:],
    "swap": lambda digits: [digits[-1], *digits[1:-1], digits[0]] if len(digits) > 1 else digits,
}
TO_DIGITS: Mapping[str, Callable[[Digits], int]] = {
    "max": max,
    "min": min,
    "first": lambda digits: digits[0],
    "last": lambda digits: digits[-1],
    "count": len,
}


@dataclass(frozen=True, kw_only=True)
class ListFunctionsOptions(QuestionOptions):
    """``min_depth`` to ``max_depth`` functions on a list of ``min_length`` to ``max_length`` digits; every number of each is equally likely."""

    min_length: int = 3
    max_length: int = 5
    min_depth: int = 1
    max_depth: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("min_depth", 1 <= self.min_depth <= self.max_depth, f"from 1 to max_depth = {self.max_depth}")
        self.require("max_depth", self.max_depth <= 4, "at most 4")
        self.require("min_length", self.min_length > self.max_depth, f"more than max_depth = {self.max_depth}, or tails leave nothing")  # fmt: skip
        self.require("max_length", self.min_length <= self.max_length <= 9, f"from min_length = {self.min_length} to 9")

    def draw(self, draws: Draws) -> Question:
        """A question; half of the outermost functions give lists, half digits."""
        digits = [draws.below(10) for _ in range(draws.between(self.min_length, self.max_length))]
        depth = draws.between(self.min_depth, self.max_depth)
        inner = [draws.one_of(tuple(TO_LISTS)) for _ in range(depth - 1)]
        outer = draws.one_of(tuple(TO_DIGITS if draws.below(2) else TO_LISTS))
        names = " ".join([outer, *inner])
        prompt = f"{names} {''.join(map(str, digits))}="
        return Question(
            prompt=prompt, answer=evaluated([outer, *inner], digits), key=prompt, kind=f"depth_{depth}", form=names
        )


def evaluated(names: list[str], digits: Digits) -> str:
    """What the functions give, the last one being applied first.

    >>> evaluated(["max", "tail"], [9, 1, 2]), evaluated(["reverse", "sort"], [3, 1, 4, 2])
    ('2', '4321')
    """
    for name in names[:0:-1]:
        digits = TO_LISTS[name](digits)
    outer = names[0]
    return str(TO_DIGITS[outer](digits)) if outer in TO_DIGITS else "".join(map(str, TO_LISTS[outer](digits)))


KINDS = (
    TaskKind(
        name="list-functions",
        summary="functions of lists of digits, one on the result of another: scores for each depth",
        options=ListFunctionsOptions,
        load=lambda options: QuestionTask(
            name="list-functions",
            options=options,
            what=f"{options.min_depth} to {options.max_depth} functions of lists of {options.min_length} to {options.max_length} digits",
        ),
    ),
)
