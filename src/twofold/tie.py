"""The algebra of ties: which linear relations hold between query, key and value, and what follows from them.

Per token and head the three roles are linear in r ≤ 3 free projections of the layer's input,

    [Q; K; V] = M · [P1 … Pr],    M ∈ Q^(3×r),

and a *tie* is the set of homogeneous linear equations whose null space M spans. Everything else is read from M: the
weights a layer needs, the tensors its cache must hold, whether its logits are symmetric, and how heads may be shared.
All fractions are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import groupby
from math import gcd, lcm
from numbers import Rational
from typing import Self

from twofold.errors import TieError, TwofoldError
from twofold.notation import MAX_COEFFICIENT, ROLES, Reading, read_pattern, read_tie

Row = tuple[Fraction, ...]

__all__ = ["ROLES", "Tie", "TiePattern"]


@dataclass(frozen=True)
class Tie:
    """A tie, in the one form that all ties of the same space share.

    ``matrix`` holds the rows of M in the order Q, K, V. A role is free if it does not depend on the roles before it; a
    free role's row is a unit row, so the basis is unique and two ties are equal exactly when they describe the same
    space. ``plus`` adds the paper's 2-D positions, which are no matter of algebra.

    >>> tie = Tie.parse("(Q, K=V)")
    >>> tie.free_projections, tie.cached_tensors, tie.is_symmetric
    (('Q', 'K'), 1, False)
    >>> Tie.parse("K - V = 0") == tie
    True
    """

    matrix: tuple[Row, Row, Row]
    plus: bool = False
    free_projections: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        q, k, v = _column_echelon(self.matrix)
        object.__setattr__(self, "matrix", (q, k, v))
        free = [
            index
            for index, row in enumerate(self.matrix)
            if _rank(self.matrix[: index + 1]) > _rank(self.matrix[:index])
        ]
        object.__setattr__(self, "free_projections", tuple(ROLES[index] for index in free))
        for role, row in zip(ROLES, self.matrix, strict=True):
            if not any(row):
                raise TwofoldError(
                    f"These equations make {role} zero, and attention needs all three roles; change them."
                )
        if any(abs(number) > MAX_COEFFICIENT for row in self.equations for number in row):
            raise TwofoldError(f"Written with whole numbers, these equations need numbers beyond {MAX_COEFFICIENT}.")
        if self.plus and not self._is_tuple:
            raise TwofoldError("The 2-D positions of '+' belong to tuples such as (Q=K, V)+, not to other equations.")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``(Q, K=V)`` or ``V = Q - K``. Raises TieError with a caret under what is wrong."""
        return cls._from_reading(read_tie(text), text)

    @classmethod
    def _from_reading(cls, reading: Reading, text: str) -> Self:
        matrix = _null_space(reading.equations)
        try:
            return cls(matrix, reading.plus)
        except TwofoldError as error:
            zero = [role for role, row in zip(ROLES, matrix, strict=True) if not any(row)]
            position = text.index(zero[0], reading.position) if zero else reading.position
            raise TieError(str(error), text, position) from None

    @classmethod
    def from_equations(cls, rows: Sequence[Sequence[Rational | int]]) -> Self:
        """The tie of rows (a, b, c), each meaning aQ + bK + cV = 0."""
        return cls(_null_space(rows))

    @classmethod
    def from_matrix(cls, rows: Sequence[Sequence[Rational | int]]) -> Self:
        """The tie of the roles Q, K, V given as combinations of any common basis."""
        q, k, v = (tuple(Fraction(number) for number in row) for row in rows)
        return cls((q, k, v))

    def row(self, role: str) -> Row:
        """The role as a combination of the free projections."""
        return self.matrix[ROLES.index(role)]

    @property
    def rank(self) -> int:
        """r, the number of free projections: the weights that a layer has."""
        return len(self.free_projections)

    @property
    def equations(self) -> tuple[tuple[int, int, int], ...]:
        """The relations between the roles as rows of coprime whole numbers, one for each role that is not free."""
        rows = []
        for index, role in enumerate(ROLES):
            if role in self.free_projections:
                continue
            coefficients = dict(zip(self.free_projections, self.matrix[index], strict=True))
            factor = lcm(*(number.denominator for number in self.matrix[index]))
            whole = [factor if other == role else -int(coefficients.get(other, 0) * factor) for other in ROLES]
            divisor = gcd(*whole)
            rows.append((whole[0] // divisor, whole[1] // divisor, whole[2] // divisor))
        return tuple(rows)

    @property
    def cached_tensors(self) -> int:
        """Tensors per token and KV head that decoding must keep: the rank of the rows of K and V."""
        return _rank(self.matrix[1:])

    @property
    def value_over_key(self) -> Fraction | None:
        """c where V = cK, which is when one cached tensor is enough; None otherwise."""
        return _ratio(self.row("V"), self.row("K"))

    @property
    def query_over_key(self) -> Fraction | None:
        """c where Q = cK; None otherwise."""
        return _ratio(self.row("Q"), self.row("K"))

    @property
    def is_symmetric(self) -> bool:
        """Whether the logits are a symmetric matrix: Q and K are proportional."""
        return self.query_over_key is not None

    @property
    def needs_equal_heads(self) -> bool:
        """Whether Q takes part in a relation.

        Then all queries of a group would be one, so KV heads cannot be fewer than query heads.
        """
        return any(equation[0] for equation in self.equations)

    def check_heads(self, num_attention_heads: int, num_key_value_heads: int) -> None:
        """Raise TwofoldError unless a layer with this tie can have so many heads."""
        if num_key_value_heads < 1 or num_attention_heads % num_key_value_heads:
            raise TwofoldError(
                f"{num_key_value_heads} KV heads do not divide {num_attention_heads} query heads into equal groups."
            )
        if self.needs_equal_heads and num_attention_heads != num_key_value_heads:
            raise TwofoldError(
                f"{self} relates Q to K or V, so all queries of a group would be one: it needs as many KV heads as query heads "
                f"({num_attention_heads}), not {num_key_value_heads}."
            )

    @property
    def without_plus(self) -> Self:
        """The same tie without 2-D positions."""
        return type(self)(self.matrix)

    @property
    def _is_tuple(self) -> bool:
        return all(sum(row) == 1 and set(row) <= {0, 1} for row in self.matrix)

    def __str__(self) -> str:
        """The canonical text: a tuple where roles are only equal or free, equations with whole numbers otherwise."""
        if not self._is_tuple:
            return "; ".join(_equation_text(equation) for equation in self.equations)
        groups: dict[Row, list[str]] = {}
        for role, row in zip(ROLES, self.matrix, strict=True):
            groups.setdefault(row, []).append(role)
        return f"({', '.join('='.join(group) for group in groups.values())}){'+' * self.plus}"

    def __repr__(self) -> str:
        return f'Tie("{self}")'


@dataclass(frozen=True)
class TiePattern:
    """Ties layer by layer: ``ties`` is one period, repeated over the layers of a model.

    >>> str(TiePattern.parse("(Q,K,V)|(Q,K,V)|(Q,K=V)"))
    '2*(Q, K, V) | (Q, K=V)'
    """

    ties: tuple[Tie, ...]

    def __post_init__(self) -> None:
        if not self.ties:
            raise TwofoldError("A pattern of ties needs at least one tie.")
        length = next(n for n in range(1, len(self.ties) + 1) if self.ties == self.ties[:n] * (len(self.ties) // n))
        object.__setattr__(self, "ties", self.ties[:length])

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ties separated by ``|``, each with an optional repetition ``3*(...)``. Raises TieError."""
        ties: list[Tie] = []
        for repetitions, reading in read_pattern(text):
            ties += [Tie._from_reading(reading, text)] * repetitions
        return cls(tuple(ties))

    def tie(self, layer_index: int) -> Tie:
        """The tie of one layer, counted from 0."""
        return self.ties[layer_index % len(self.ties)]

    def check_layers(self, num_hidden_layers: int) -> None:
        """Raise TwofoldError unless the period divides the number of layers."""
        if num_hidden_layers % len(self.ties):
            raise TwofoldError(
                f"{self} names {len(self.ties)} layers, which does not divide the model's {num_hidden_layers}."
            )

    def __str__(self) -> str:
        parts = []
        for tie, run in groupby(self.ties):
            count, text = len(list(run)), str(tie)
            bracketed = text if text.startswith("(") else f"({text})"
            parts.append(text if count == 1 else f"{count}*{bracketed}")
        return " | ".join(parts)

    def __repr__(self) -> str:
        return f'TiePattern("{self}")'


def _null_space(equations: Sequence[Sequence[Rational | int]]) -> tuple[Row, Row, Row]:
    """Rows of a basis of all (Q, K, V) that obey the equations, from their reduced row echelon form."""
    reduced = _row_echelon([[Fraction(number) for number in row] for row in equations])
    pivots = {next(index for index, number in enumerate(row) if number): row for row in reduced}
    free = [index for index in range(3) if index not in pivots]
    q, k, v = (
        tuple(-pivots[index][column] if index in pivots else Fraction(int(index == column)) for column in free)
        for index in range(3)
    )
    return q, k, v


def _column_echelon(matrix: Sequence[Row]) -> list[Row]:
    """The unique basis of the same column space in which each role that is independent of those before it has a unit row."""
    columns = _row_echelon([list(column) for column in zip(*matrix, strict=True)])
    return [tuple(column[index] for column in columns) for index in range(3)]


def _row_echelon(rows: Sequence[Sequence[Fraction]]) -> list[list[Fraction]]:
    """Reduced row echelon form without zero rows."""
    remaining, reduced = [list(row) for row in rows], list[list[Fraction]]()
    for column in range(3):
        pivot = next((row for row in remaining if row[column]), None)
        if pivot is None:
            continue
        remaining.remove(pivot)
        pivot = [number / pivot[column] for number in pivot]
        remaining = [_eliminate(row, pivot, column) for row in remaining]
        reduced = [_eliminate(row, pivot, column) for row in reduced] + [pivot]
    return reduced


def _eliminate(row: list[Fraction], pivot: list[Fraction], column: int) -> list[Fraction]:
    return [number - row[column] * other for number, other in zip(row, pivot, strict=True)]


def _rank(rows: Sequence[Row]) -> int:
    return len(_row_echelon([[*row, *[Fraction(0)] * (3 - len(row))] for row in rows]))


def _ratio(left: Row, right: Row) -> Fraction | None:
    """c where left = c · right, both being nonzero; None if there is none."""
    index = next(i for i, number in enumerate(right) if number)
    ratio = left[index] / right[index]
    return ratio if all(a == ratio * b for a, b in zip(left, right, strict=True)) else None


def _equation_text(equation: tuple[int, int, int]) -> str:
    """``2V = Q + K``: the last role that takes part, with a positive factor, stands alone on the left."""
    last = max(index for index, number in enumerate(equation) if number)
    sign = 1 if equation[last] > 0 else -1
    right = ""
    for role, number in zip(ROLES[:last], equation[:last], strict=True):
        if factor := -sign * number:
            joint = (" + " if factor > 0 else " - ") if right else ("" if factor > 0 else "-")
            right += f"{joint}{abs(factor) if abs(factor) != 1 else ''}{role}"
    return f"{abs(equation[last]) if abs(equation[last]) != 1 else ''}{ROLES[last]} = {right}"
