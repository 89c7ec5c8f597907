"""Explanations: the facts agree with the algebra, the words with the facts, and the picture with the matrix."""

from __future__ import annotations

import doctest
import io
import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from twofold import explain as explain_module
from twofold import picture
from twofold.errors import TieError, TwofoldError
from twofold.explain import cost_of, explain, expression, facts_of
from twofold.positions import LearnedPositions
from twofold.spec import ModelSpec
from twofold.tie import ROLES, Tie

MODEL = ModelSpec(
    tie="(Q, K, V)",
    architecture="causal_lm",
    hidden_size=1024,
    num_hidden_layers=20,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=64,
    intermediate_size=4096,
    positions=LearnedPositions(length=2048),
    vocab_size=50304,
)
TUPLES = ["(Q, K, V)", "(Q=K, V)", "(Q, K=V)", "(Q=V, K)", "(Q=K=V)"]


@st.composite
def ties(draw: st.DrawFn) -> Tie:
    number = st.fractions(min_value=-5, max_value=5, max_denominator=7)
    rows = draw(st.lists(st.tuples(number, number, number), max_size=2))
    try:
        return Tie.from_equations(rows)
    except TwofoldError:
        return Tie.parse("(Q, K, V)")


def rendered(renderable: object, *, width: int = 80, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    Console(file=stream, width=width).print(renderable)
    stream.flush()
    return raw.getvalue().decode(encoding)


@given(ties())
def test_each_role_is_written_as_its_row(tie: Tie):
    for role in ROLES:
        row = tie.row(role)
        text = expression(tie, role)
        read = Tie.parse(f"{role} = {text}") if text != role else None
        if read is None:
            assert role in tie.free_projections
        else:  # the equation that the text states holds for the role's own row
            for a, b, c in read.equations:
                combined = [a * q + b * k + c * v for q, k, v in zip(*tie.matrix, strict=True)]
                assert not any(combined), (text, row)


@given(ties())
def test_the_equations_shown_are_the_tie(tie: Tie):
    facts = facts_of(tie)
    assert not facts.equations or Tie.parse("; ".join(facts.equations)) == tie.without_plus
    assert len(facts.equations) == 3 - tie.rank


@given(ties())
def test_the_circuit_has_a_joint_for_each_use_and_caches_what_the_algebra_says(tie: Tie):
    facts = facts_of(tie)
    lines = picture.circuit(facts)
    text = "\n".join(lines)
    used = {
        name
        for index, name in enumerate(tie.free_projections)
        if any(row[index] for role, row in zip(ROLES, tie.matrix, strict=True) if role not in tie.free_projections)
    }
    assert text.count("●") == len(used)
    assert text.count("cache") == tie.cached_tensors
    assert all((f"W_{role} " in text) == (role in tie.free_projections) for role in ROLES)
    assert all(line == line.rstrip() for line in lines)
    assert picture.plain(text).isascii()


def test_the_circuit_of_a_difference():
    assert picture.circuit(facts_of(Tie.parse("V = Q - K"))) == [
        "     ┌─▶ W_Q ─●─────▶ Q",
        "x ───┤        │",
        "     └─▶ W_K ─┼─●───▶ K         ──▶ cache",
        "              │ │",
        "              └─┴───▶ V = Q - K ──▶ cache",
    ]


def test_the_papers_figures_at_300m():
    costs = {text: explain(text, MODEL).cost for text in TUPLES}
    in_millions = {text: round(cost.parameters / 1e6, 1) for text, cost in costs.items() if cost}
    assert in_millions["(Q, K, V)"] == 305.5
    assert in_millions["(Q, K=V)"] == in_millions["(Q=K, V)"] == 284.5
    assert in_millions["(Q=K=V)"] == 263.6
    assert costs["(Q, K=V)"].cache_bytes * 2 == costs["(Q, K, V)"].cache_bytes


def test_published_names_are_equations_and_say_so():
    for text in ["Q-K=V", "Q - K = V", "Q−K=V"]:
        explanation = explain(text, MODEL)
        assert explanation.pattern == "V = Q - K"
        assert "2026 paper" in explanation.notes[0]
        assert '"(Q, K=V)"' in explanation.notes[0]
    assert '"(Q=K, V)"' in explain("Q=K-V", MODEL).notes[0]
    assert not explain("V = Q - K", MODEL).notes
    assert not explain("(Q, K=V)", MODEL).notes


def test_a_model_that_cannot_have_the_tie_is_refused_in_words():
    shared = MODEL.with_changes(num_key_value_heads=4)
    explanation = explain("V = Q - K", shared)
    assert explanation.cost is None
    assert "16" in explanation.refusal
    assert explanation.refusal.endswith(".")
    assert explain("(Q, K=V)", shared).cost.cached_floats_per_token == 20 * 4 * 64
    assert "does not divide" in explain("6*(Q, K, V) | (Q, K=V)", MODEL).refusal


def test_plus_in_a_causal_model_leaves_the_positions_out():
    explanation = explain("(Q=K, V)+", MODEL)
    assert explanation.cost == explain("(Q=K, V)", MODEL).cost
    assert "not causal" in explanation.notes[0]
    encoder = MODEL.with_changes(architecture="token_classification", num_labels=11, causal=False)
    with_plus, without = explain("(Q=K, V)+", encoder), explain("(Q=K, V)", encoder)
    assert with_plus.cost.parameters - without.cost.parameters == 20 * (10 + 1)
    assert with_plus.cost.decode_flops_per_token == 0


def test_mistakes_are_the_users():
    with pytest.raises(TieError):
        explain("(Q, K)", MODEL)
    with pytest.raises(TwofoldError, match="fp32"):
        explain("(Q, K=V)", MODEL, dtype="float")
    with pytest.raises(TwofoldError, match="tokens"):
        explain("(Q, K=V)", MODEL, tokens=-1)


def test_an_explanation_is_json():
    told = json.loads(json.dumps(explain("3*(Q, K, V) | (Q, K=V)", MODEL).to_dict()))
    assert told["layers"] == [[3, "(Q, K, V)"], [1, "(Q, K=V)"]]
    assert told["ties"][1]["matrix"] == [["1", "0"], ["0", "1"], ["0", "1"]]
    assert told["cost"] == json.loads(
        json.dumps(cost_of(MODEL.with_changes(tie="3*(Q, K, V) | (Q, K=V)"), tokens=32768, dtype="bf16").__dict__)
    )


@pytest.mark.parametrize(
    "text", [*TUPLES, "V = Q - K", "2V = Q + K", "K = -2Q; 3V = Q", "(Q=K=V)+", "3*(Q, K, V) | (Q, K=V)"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_page_fits_a_terminal(text: str, encoding: str):
    explanation, reference = explain(text, MODEL), explain("(Q, K, V)", MODEL)
    caption = picture.caption(MODEL, "paper-300m", tokens=32768, dtype="bf16")
    page = rendered(picture.page(explanation, reference, MODEL, caption), encoding=encoding)
    assert max(map(len, page.splitlines())) <= 80
    assert "…" not in page
    for facts in explanation.ties:
        assert facts.weights in page
    table = rendered(picture.comparison([reference, explanation], reference, caption), encoding=encoding)
    assert max(map(len, table.splitlines())) <= 80


def test_numbers_in_words():
    assert [picture.count_text(n) for n in (7, 1500, 305534976, 1.2e9, 2e13)] == [
        "7",
        "1.50K",
        "305.5M",
        "1.20B",
        "20.0T",
    ]
    assert [picture.bytes_text(n) for n in (7, 40960, 2**31, 2**41)] == ["7 B", "40.0 KiB", "2.00 GiB", "2.00 TiB"]
    assert picture.change_text(1, 2) == "-50.0%"
    assert picture.change_text(2, 2) == "same"
    assert expression(Tie.from_equations([(Fraction(-1, 2), -1, 1)]), "V") == "1/2 Q + K"


@pytest.mark.parametrize("module", [explain_module, picture])
def test_doctests(module):
    done = doctest.testmod(module)
    assert done.failed == 0
    assert done.attempted > 0
