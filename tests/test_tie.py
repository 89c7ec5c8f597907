"""The algebra: reading and printing, what follows from a tie, what is refused and where, and the two theorems."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from twofold.errors import TieError, TwofoldError
from twofold.notation import MAX_LENGTH
from twofold.tie import ROLES, Tie, TiePattern

NAMED = {
    # text: canonical text, free projections, cached tensors, symmetric, needs as many KV heads as query heads
    "(Q, K, V)": ("(Q, K, V)", "QKV", 2, False, False),
    "(Q=K, V)": ("(Q=K, V)", "QV", 2, True, True),
    "(Q, K=V)": ("(Q, K=V)", "QK", 1, False, False),
    "(Q=K=V)": ("(Q=K=V)", "Q", 1, True, True),
    "(Q=V, K)": ("(Q=V, K)", "QK", 2, False, True),
    "(V=K, Q)": ("(Q, K=V)", "QK", 1, False, False),
    "(K, V=Q)+": ("(Q=V, K)+", "QK", 2, False, True),
    "V = Q - K": ("V = Q - K", "QK", 2, False, True),
    "Q-K=V": ("V = Q - K", "QK", 2, False, True),
    "Q − K = V": ("V = Q - K", "QK", 2, False, True),
    "2V = Q + K": ("2V = Q + K", "QK", 2, False, True),
    "K - 1/2 Q = 0": ("2K = Q", "QV", 2, True, True),
    "0 = Q/2 - K": ("2K = Q", "QV", 2, True, True),
    "0.5*Q = K": ("2K = Q", "QV", 2, True, True),
    "K = V": ("(Q, K=V)", "QK", 1, False, False),
    "V = -3K": ("V = -3K", "QK", 1, False, False),
    "K = 2Q; V = 3Q": ("K = 2Q; V = 3Q", "Q", 1, True, True),
    "Q = K = V": ("(Q=K=V)", "Q", 1, True, True),
    "K + V = V + K": ("(Q, K, V)", "QKV", 2, False, False),
}


@pytest.mark.parametrize(("text", "facts"), NAMED.items())
def test_named_ties(text, facts):
    canonical, free, cached, symmetric, equal_heads = facts
    tie = Tie.parse(text)
    assert str(tie) == canonical
    assert tie.free_projections == tuple(free)
    assert tie.rank == len(free)
    assert tie.cached_tensors == cached
    assert tie.is_symmetric is symmetric
    assert tie.needs_equal_heads is equal_heads
    assert repr(tie) == f'Tie("{canonical}")'


def test_the_misprint_is_not_k_equals_v():
    assert Tie.parse("Q-K=V") != Tie.parse("(Q, K=V)")
    assert "Q-K=V" not in str(Tie.parse("Q-K=V"))


REFUSED = {
    "": (0, "empty"),
    "   ": (3, "empty"),
    "(Q, K, W)": (7, "'W' is not known"),
    "V = Q + bias": (8, "'bias' is not known"),
    "V = Q + 1": (8, "no constant term"),
    "1 = 1": (0, "no constant term"),
    "(Q, K=V": (0, "never closed"),
    "(Q, K=V))": (8, "no opening"),
    "Q = K)": (5, "no opening"),
    "(Q, K)": (5, "where V stands"),
    "(Q)": (2, "where K and V stand"),
    "()": (1, "role (Q, K or V) is wanted"),
    "(Q, K, V, K)": (10, "twice"),
    "(Q, K=V) extra": (9, "'extra' is not known"),
    "(Q, K=V) Q": (9, "complete before 'Q'"),
    "(Q, K=V)++": (9, "complete before '+'"),
    "(Q, K+V)": (5, "does not belong in a tuple"),
    "(Q, 2K, V)": (4, "role (Q, K or V) is wanted"),
    "Q=K, V": (3, "complete before ','"),
    "K = -K": (0, "make K zero"),
    "V = 0": (0, "make V zero"),
    "Q = K; V = 2V": (7, "make V zero"),
    "Q = K; Q = 2K": (0, "make Q zero"),
    "V = inf Q": (4, "'inf' is not known"),
    "V = nan*Q": (4, "'nan' is not known"),
    "V = 1e999 Q": (4, "too large or too fine"),
    "V = 1e99999999999 Q": (4, "too large or too fine"),
    "V = 1/0 Q": (6, "divided by zero"),
    "V = 1000001 Q": (4, "too large or too fine"),
    "V = 0.00000001 Q": (4, "too large or too fine"),
    "V = 1/999983 Q + 1/999979 K": (0, "numbers beyond"),
    "V = Q K": (6, "missing before this term"),
    "V = Q -": (7, "ends too early"),
    "V = * Q": (4, "needs a number before it"),
    "V = Q * 2": (6, "complete before '*'"),
    "V = ": (4, "ends too early"),
    "= V": (0, "A term such as Q"),
    "Q - K": (5, "needs an '='"),
    "Q ≠ K = V": (2, "≠ has no place"),
    "(q, k=v)": (1, "capitals"),
    "٣Q = V": (0, "is not known"),
    "V = Q |": (6, "complete before '|'"),
}


@pytest.mark.parametrize(("text", "place_and_words"), REFUSED.items())
def test_refusals_point_at_the_place(text, place_and_words):
    position, words = place_and_words
    with pytest.raises(TieError) as caught:
        Tie.parse(text)
    assert words in caught.value.sentence
    sentence, shown, caret = str(caught.value).split("\n")
    assert (caught.value.position, caret.index("^") - 2) == (position, position)
    assert shown == f"  {text}"
    assert sentence.endswith((".", ")."))


def test_a_long_text_is_refused_at_once():
    with pytest.raises(TieError, match="at most"):
        Tie.parse("(" * (MAX_LENGTH + 1))
    with pytest.raises(TwofoldError, match="not as int"):
        Tie.parse(3)  # type: ignore[arg-type]


@given(st.text(alphabet="QKV0129./+-*=;,()| eqkv≠−\t\n²", max_size=24))
@example("V=Q\nK")
def test_any_text_is_a_tie_or_a_tie_error(text):
    for parse in (Tie.parse, TiePattern.parse):
        try:
            value = parse(text)
        except TieError as error:
            position = error.position
        else:
            position, value_again = 0, parse(str(value))
            assert value_again == value
        assert 0 <= position <= len(text)


# Ties drawn at random.

coefficients = st.fractions(min_value=-4, max_value=4, max_denominator=5)
nonzero = coefficients.filter(bool)


@st.composite
def ties(draw) -> Tie:
    rows = draw(st.lists(st.tuples(coefficients, coefficients, coefficients), max_size=2))
    try:
        return Tie.from_equations(rows)
    except TwofoldError:
        return Tie.parse(draw(st.sampled_from(sorted(NAMED))))


@given(ties())
def test_printing_and_reading_are_inverse(tie):
    assert Tie.parse(str(tie)) == tie
    assert str(Tie.parse(str(tie))) == str(tie)


@given(ties(), st.data())
def test_m_and_mg_describe_one_tie(tie, data):
    g = data.draw(
        st.lists(st.lists(coefficients, min_size=tie.rank, max_size=tie.rank), min_size=tie.rank, max_size=tie.rank)
    )
    if abs(np.linalg.det(np.array(g, dtype=float))) < 1e-9:
        return
    mixed = [
        [sum((a * g[i][j] for i, a in enumerate(row)), Fraction(0)) for j in range(tie.rank)] for row in tie.matrix
    ]
    again = Tie.from_matrix(mixed)
    assert again == tie.without_plus
    assert hash(again) == hash(tie.without_plus)


@given(ties(), nonzero, nonzero)
def test_scaling_and_mixing_equations_changes_nothing(tie, factor, other):
    rows = [[factor * number for number in row] for row in tie.equations]
    if len(rows) == 2:
        rows[1] = [a + other * b for a, b in zip(rows[1], rows[0], strict=True)]
    assert Tie.from_equations([*rows, *rows]) == tie.without_plus


@given(ties())
def test_the_matrix_solves_the_equations_and_free_rows_are_unit_rows(tie):
    for equation in tie.equations:
        for column in range(tie.rank):
            assert sum(a * row[column] for a, row in zip(equation, tie.matrix, strict=True)) == 0
    for index, role in enumerate(tie.free_projections):
        assert tie.row(role) == tuple(Fraction(int(index == other)) for other in range(tie.rank))
    assert tie.rank == 3 - len(tie.equations)
    assert tie.is_symmetric == (tie.query_over_key is not None)


def test_equal_spaces_are_one_key():
    assert len({Tie.parse(text) for text in ("(Q, K=V)", "K=V", "2K - 2V = 0", "V = K; K = V")}) == 1
    assert Tie.parse("(Q=K, V)+") != Tie.parse("(Q=K, V)")
    assert Tie.parse("(Q=K, V)+").without_plus == Tie.parse("(Q=K, V)")


def test_plus_belongs_to_tuples():
    with pytest.raises(TwofoldError, match="belong to tuples"):
        Tie(Tie.parse("V = Q - K").matrix, plus=True)


@pytest.mark.parametrize("text", ["(Q=K, V)", "V = Q - K", "(Q=V, K)", "(Q=K=V)"])
def test_a_tie_of_the_query_needs_equal_heads(text):
    Tie.parse(text).check_heads(6, 6)
    with pytest.raises(TwofoldError, match=r"as many KV heads as query heads \(6\), not 2"):
        Tie.parse(text).check_heads(6, 2)


def test_groups_must_be_equal():
    Tie.parse("(Q, K=V)").check_heads(6, 2)
    for groups in (4, 0, -1):
        with pytest.raises(TwofoldError, match="do not divide"):
            Tie.parse("(Q, K=V)").check_heads(6, groups)


# Patterns.


@pytest.mark.parametrize(
    ("text", "canonical", "period"),
    [
        ("3*(Q, K, V) | (Q, K=V)", "3*(Q, K, V) | (Q, K=V)", 4),
        ("(Q,K,V)|(Q,K,V)|K=V", "2*(Q, K, V) | (Q, K=V)", 3),
        ("4*(Q, K=V)", "(Q, K=V)", 1),
        ("2*(V = Q - K) | (Q, K, V)", "2*(V = Q - K) | (Q, K, V)", 3),
        ("V = Q - K; | (Q, K=V) | V = Q - K | (Q, K=V)", "V = Q - K | (Q, K=V)", 2),
        ("(Q=K, V)+", "(Q=K, V)+", 1),
    ],
)
def test_patterns(text, canonical, period):
    pattern = TiePattern.parse(text)
    assert str(pattern) == canonical
    assert TiePattern.parse(canonical) == pattern
    assert hash(TiePattern.parse(canonical)) == hash(pattern)
    assert len(pattern.ties) == period
    assert [pattern.tie(layer) for layer in range(2 * period)] == 2 * list(pattern.ties)


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("(Q, K, V) | (Q, K)", 17),
        ("(Q, K, V) | V = 0", 12),
        ("0*(Q, K, V)", 0),
        ("1/2*(Q, K, V)", 3),
        ("2*(V = Q - K", 2),
        ("|", 0),
    ],
)
def test_patterns_point_into_the_whole_text(text, position):
    with pytest.raises(TieError) as caught:
        TiePattern.parse(text)
    assert caught.value.position == position


def test_the_period_must_divide_the_layers():
    TiePattern.parse("3*(Q, K, V) | (Q, K=V)").check_layers(8)
    with pytest.raises(TwofoldError, match="names 4 layers, which does not divide the model's 6"):
        TiePattern.parse("3*(Q, K, V) | (Q, K=V)").check_layers(6)
    with pytest.raises(TwofoldError, match="at least one tie"):
        TiePattern(())


# The theorems (docs/theorems.md).


@given(ties())
def test_one_cached_tensor_means_that_values_are_multiples_of_keys(tie):
    """Theorem 1, algebra: cached rank 1 exactly when V = cK with c ≠ 0."""
    c = tie.value_over_key
    assert (tie.cached_tensors == 1) == (c is not None)
    if c is not None:
        assert c != 0
        assert tie.row("V") == tuple(c * number for number in tie.row("K"))


def attention(query, key, value):
    """softmax(Q Kᵀ / √D) V in float64, for [H, T, D]."""
    logits = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)) @ value


def drawn(seed, *shapes):
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape) for shape in shapes]


@given(ties().filter(lambda tie: tie.cached_tensors == 1), st.integers(0, 2**31))
def test_a_multiple_is_absorbed_by_the_output(tie, seed):
    """Theorem 1, function: with V = cK the layer equals the one with V = K whose W_O is multiplied by c."""
    query, key, w_o = drawn(seed, (3, 7, 5), (3, 7, 5), (3, 5, 11))
    c = float(tie.value_over_key)
    assert np.allclose(
        attention(query, key, c * key) @ w_o, attention(query, key, key) @ (c * w_o), rtol=1e-12, atol=1e-12
    )


@given(st.integers(0, 2**31))
def test_an_invertible_map_per_head_is_absorbed_by_the_output(seed):
    """Theorem 2: V = K A with A per head equals K = V with A W_O; and with one head every (Q, K, V) is of this form."""
    hidden, w_q, w_k, a, w_o = drawn(seed, (7, 15), (3, 15, 5), (3, 15, 5), (3, 5, 5), (3, 5, 15))
    query, key = hidden @ w_q, hidden @ w_k
    assert np.allclose(
        (attention(query, key, key @ a) @ w_o).sum(0), (attention(query, key, key) @ (a @ w_o)).sum(0), atol=1e-9
    )

    w_k, w_v = drawn(seed + 1, (1, 5, 5), (1, 5, 5))
    if np.linalg.cond(w_k[0]) > 1e4:
        return
    hidden, w_q, w_o = hidden[:, :5], w_q[:1, :5], w_o[:1]
    query, key = hidden @ w_q, hidden @ w_k
    untied, tied = (
        attention(query, key, hidden @ w_v) @ w_o,
        attention(query, key, key) @ (np.linalg.inv(w_k) @ w_v @ w_o),
    )
    assert np.allclose(untied, tied, atol=1e-7 * max(1.0, float(np.abs(untied).max())))


def test_with_several_heads_keys_and_values_span_more_than_k_equals_v_can():
    """Theorem 2, the limit: a head's K and V together read 2D directions of the input, those of K=V read D."""
    w_k, w_v = drawn(5, (12, 4), (12, 4))
    assert np.linalg.matrix_rank(np.hstack([w_k, w_v])) == 8
    assert np.linalg.matrix_rank(np.hstack([w_k, w_k @ drawn(6, (4, 4))[0]])) == 4


def test_the_checks_can_fail():
    """A liar: a layer with other values is told apart by the comparison the theorems use."""
    query, key, value = drawn(7, (3, 7, 5), (3, 7, 5), (3, 7, 5))
    assert not np.allclose(attention(query, key, value), attention(query, key, key), atol=1e-3)
    assert Tie.parse("V = Q - K").value_over_key is None
    assert set(ROLES) == {"Q", "K", "V"}


def test_the_table_of_the_documentation_is_true():
    page = (Path(__file__).parent.parent / "docs" / "notation.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `")
    ]
    assert len(rows) >= 8
    for text, free, cached, symmetric, heads in rows:
        tie = Tie.parse(text.strip("`"))
        assert str(tie) == text.strip("`")
        assert (", ".join(tie.free_projections), str(tie.cached_tensors)) == (free, cached)
        assert symmetric == ("yes" if tie.is_symmetric else "no")
        assert heads == ("as many as query heads" if tie.needs_equal_heads else "any")
