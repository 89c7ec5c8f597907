"""How a tie is written: text to exact linear equations, with a caret under whatever cannot be read.

Two notations, one meaning. A tuple of groups, ``(Q, K=V)``, says which roles are equal; equations, ``V = Q - K`` or
``K = 1/2 Q``, say any linear relation. This module knows text only; what equations mean is :mod:`twofold.tie`'s business.
"""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple, NoReturn

from twofold.errors import TieError, TwofoldError

ROLES = ("Q", "K", "V")
MAX_LENGTH = 1000
MAX_COEFFICIENT = 10**6
MAX_REPETITIONS = 10**4

Equation = tuple[Fraction, Fraction, Fraction]


class Reading(NamedTuple):
    """What a text says: rows (a, b, c), each meaning aQ + bK + cV = 0, and whether the 2-D ``+`` follows."""

    equations: tuple[Equation, ...]
    plus: bool
    position: int


class _Token(NamedTuple):
    kind: str  # "number", "role", "end", or the sign itself
    text: str
    position: int


_TOKEN = re.compile(
    r"(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)|(?P<role>[QKV])|(?P<sign>[-−+*/=;,()|])|(?P<space>\s+)"
)


def read_tie(text: str) -> Reading:
    """Read one tie. Raises TieError, and nothing else, for a text that is not one."""
    reader = _Reader(text)
    reading = reader.tie()
    reader.expect_end()
    return reading


def read_pattern(text: str) -> list[tuple[int, Reading]]:
    """Read ``3*(Q, K, V) | (Q, K=V)``: how often each tie is repeated, and the tie. Raises TieError."""
    reader = _Reader(text)
    parts = [reader.repeated_tie()]
    while reader.accept("|"):
        parts.append(reader.repeated_tie())
    reader.expect_end()
    return parts


class _Reader:
    """Recursive descent over the tokens of one text."""

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise TwofoldError(f"A tie is written as text, such as '(Q, K=V)', not as {type(text).__name__}.")
        self.text = text
        if len(text) > MAX_LENGTH:
            raise TieError(
                f"A tie is at most {MAX_LENGTH} characters long; this text has {len(text)}.", self.text[:40] + " …", 40
            )
        self.tokens = list(self._tokens())
        self.index = 0
        if self.token.kind == "end":
            self.fail("The text is empty; write a tie such as '(Q, K=V)' or 'V = Q - K'.")

    def _tokens(self) -> list[_Token]:
        tokens, position = [], 0
        while position < len(self.text):
            match = _TOKEN.match(self.text, position)
            if match is None:
                self._refuse_symbol(position)
            text = match.group()
            if match.lastgroup != "space":
                kind = str(match.lastgroup) if match.lastgroup != "sign" else text.replace("−", "-")
                tokens.append(_Token(kind, text, position))
            position = match.end()
        return [*tokens, _Token("end", "", len(self.text))]

    def _refuse_symbol(self, position: int) -> NoReturn:
        symbol = self.text[position]
        if symbol == "≠":
            sentence = (
                "A tie says what is equal, so ≠ has no place in it; write '(Q, K=V)' for 'K equals V, and Q does not'."
            )
        elif symbol in "qkv":
            sentence = f"{symbol!r} is not a role; roles are written in capitals: {symbol.upper()}."
        else:
            word = re.match(r"[^\W\d_]+|.", self.text[position:])
            sentence = (
                f"{word.group() if word else symbol!r} is not known here; use Q, K, V, numbers and + - * / = ; , ( )."
            )
        raise TieError(sentence, self.text, position)

    # The state of the reader.

    @property
    def token(self) -> _Token:
        return self.tokens[self.index]

    def advance(self) -> _Token:
        token = self.token
        self.index += token.kind != "end"
        return token

    def accept(self, kind: str) -> bool:
        found = self.token.kind == kind
        if found:
            self.advance()
        return found

    def fail(self, sentence: str, position: int | None = None) -> NoReturn:
        raise TieError(sentence, self.text, self.token.position if position is None else position)

    def expect_end(self) -> None:
        if self.token.kind == ")":
            self.fail("This closing bracket has no opening one; remove it.")
        if self.token.kind != "end":
            self.fail(
                f"The tie is complete before {self.token.text!r}; remove what follows, or separate equations with ';'."
            )

    # tie := tuple ['+'] | equations

    def repeated_tie(self) -> tuple[int, Reading]:
        count, star, bracket = (self.tokens[min(self.index + offset, len(self.tokens) - 1)] for offset in range(3))
        if (count.kind, star.kind, bracket.kind) != ("number", "*", "("):
            return 1, self.tie()
        if not count.text.isdigit() or not 1 <= int(count.text) <= MAX_REPETITIONS:
            self.fail(f"A tie is repeated a whole number of times from 1 to {MAX_REPETITIONS}, not {count.text}.")
        self.index += 2
        if not self._bracket_holds_equations():
            return int(count.text), self.tie()
        opening = self.advance()
        reading = self.equations()
        if not self.accept(")"):
            self.fail("This bracket is never closed; add ')'.", opening.position)
        return int(count.text), reading

    def _bracket_holds_equations(self) -> bool:
        for token in self.tokens[self.index + 1 :]:
            if token.kind in (")", "end", ","):
                return False
            if token.kind in ("-", "+", "*", "/", ";", "number"):
                return True
        return False

    def tie(self) -> Reading:
        return self.tuple_of_groups() if self.token.kind == "(" else self.equations()

    # tuple := '(' group {',' group} ')';  group := role {'=' role}

    def tuple_of_groups(self) -> Reading:
        opening, seen, equations = self.advance(), set[str](), list[Equation]()
        while True:
            first = previous = self._new_role(seen)
            while self.accept("="):
                previous = self._new_role(seen)
                equations.append(_difference(first, previous))
            if self.token.kind == "end":
                self.fail("This bracket is never closed; add ')'.", opening.position)
            if self.token.kind == ")":
                break
            if not self.accept(","):
                self.fail(
                    f"{self.token.text!r} does not belong in a tuple; separate groups with ',' and equal roles with '='."
                )
        if missing := [role for role in ROLES if role not in seen]:
            self.fail(f"The tuple does not say where {' and '.join(missing)} stands; name each of Q, K and V once.")
        self.advance()
        return Reading(tuple(equations), self.accept("+"), opening.position)

    def _new_role(self, seen: set[str]) -> str:
        token = self.token
        if token.kind == "end":
            self.fail("The tuple ends too early: a role (Q, K or V) and a closing bracket are wanted here.")
        if token.kind != "role":
            self.fail(f"A role (Q, K or V) is wanted here, not {token.text!r}.")
        if token.text in seen:
            self.fail(f"{token.text} stands in the tuple twice; name each of Q, K and V once.")
        seen.add(self.advance().text)
        return token.text

    # equations := equation {';' equation};  equation := sum '=' sum {'=' sum}

    def equations(self) -> Reading:
        position, found = self.token.position, self.equation()
        while self.accept(";"):
            if self.token.kind in ("end", "|", ")"):
                break
            found += self.equation()
        return Reading(tuple(found), False, position)

    def equation(self) -> list[Equation]:
        sides = [self.sum()]
        if self.token.kind != "=" and self.token.kind in ("end", ";", "|"):
            self.fail("An equation needs an '=', as in 'V = Q - K'.")
        while self.accept("="):
            sides.append(self.sum())
        if len(sides) == 1:
            self.fail(
                f"{self.token.text!r} does not belong in an equation here; write sums of Q, K and V, as in 'V = Q - 1/2 K'."
            )
        return [_minus(left, right) for left, right in pairwise(sides)]

    def sum(self) -> Equation:
        total = self.term(self._sign(required=False))
        while self.token.kind in ("+", "-", "role", "number"):
            if self.token.kind in ("role", "number"):
                self.fail("A '+' or '-' is missing before this term.")
            total = _minus(total, self.term(-self._sign(required=True)))
        return total

    def _sign(self, *, required: bool) -> int:
        if self.token.kind not in ("+", "-"):
            assert not required
            return 1
        return -1 if self.advance().kind == "-" else 1

    def term(self, sign: int) -> Equation:
        start = self.token
        coefficient = self._coefficient() if start.kind == "number" else Fraction(1)
        star = self.token
        if self.accept("*") and (start.kind != "number" or self.token.kind != "role"):
            self.fail("This '*' needs a number before it and a role after it.", star.position)
        if self.token.kind == "role":
            role = self.advance().text
            if self.accept("/"):
                coefficient /= self._divisor()
            self._check_size(coefficient, start.position)
            return _unit(role, sign * coefficient)
        if start.kind != "number":
            self.fail(
                f"A term such as Q or 2K is wanted here, not {self.token.text!r}."
                if self.token.text
                else "The equation ends too early: a term such as Q or 2K is wanted here."
            )
        if coefficient:
            self.fail("A tie has no constant term: every number multiplies Q, K or V.", start.position)
        return _unit("Q", Fraction(0))

    def _coefficient(self) -> Fraction:
        start = self.token.position
        value = self._number()
        if self.accept("/"):
            value /= self._divisor()
        self._check_size(value, start)
        return value

    def _divisor(self) -> Fraction:
        position = self.token.position
        if self.token.kind != "number":
            self.fail("A number is wanted after '/'.")
        value = self._number()
        if not value:
            self.fail("A coefficient cannot be divided by zero.", position)
        return value

    def _number(self) -> Fraction:
        token = self.advance()
        exponent = re.search(r"[eE]([+-]?[0-9]+)$", token.text)
        # Refused before the fraction is built: 1e999999999 would fill the memory.
        if exponent and (len(exponent[1]) > 4 or abs(int(exponent[1])) > 12):
            self.fail(
                f"The number {token.text} is too large or too fine; a coefficient is a fraction of numbers up to a million.",
                token.position,
            )
        return Fraction(token.text)

    def _check_size(self, value: Fraction, position: int) -> None:
        if max(abs(value.numerator), value.denominator) > MAX_COEFFICIENT:
            self.fail(
                "This coefficient is too large or too fine; it must be a fraction of numbers up to a million.", position
            )


def _unit(role: str, coefficient: Fraction) -> Equation:
    q, k, v = (coefficient if role == other else Fraction(0) for other in ROLES)
    return q, k, v


def _minus(left: Equation, right: Equation) -> Equation:
    q, k, v = (a - b for a, b in zip(left, right, strict=True))
    return q, k, v


def _difference(first: str, second: str) -> Equation:
    return _minus(_unit(first, Fraction(1)), _unit(second, Fraction(1)))
