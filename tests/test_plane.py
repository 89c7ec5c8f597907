"""The plane of ties: where ties lie, which of them are one class of functions, and that the study covers the plane."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twofold.attention import Attention
from twofold.errors import TwofoldError
from twofold.plane import Point, Region, angle, covering, neighbours, on_disc, point, point_of
from twofold.positions import RotaryPositions
from twofold.spec import AttentionSpec
from twofold.study.plan import builtin
from twofold.tie import Tie

COVERING = covering()
NAMED = ["(Q=K, V)", "(Q, K=V)", "(Q=V, K)", "V = Q - K", "V = K - Q", "V = Q + K", "Q = -K", "V = -K", "2V = Q + K"]
SIMPLEST = {
    Region.SAME_SIGNS: "V = Q + K",
    Region.OPPOSITE_SIGNS: "V = Q - K",
    Region.VALUE_IS_KEY: "(Q, K=V)",
    Region.VALUE_IS_QUERY: "(Q=V, K)",
    Region.EQUAL_QUERY_KEY: "(Q=K, V)",
    Region.OPPOSITE_QUERY_KEY: "K = -Q",
}
whole = st.integers(-9, 9)


def sphere(count: int, seed: int = 0) -> np.ndarray:
    directions = np.random.default_rng(seed).normal(size=(count, 3))
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


# Points


@given(whole, whole, whole, st.integers(-3, 3).filter(bool))
def test_a_point_is_a_tie_whatever_its_equation_is_multiplied_by(a: int, b: int, c: int, factor: int):
    if sum(map(bool, (a, b, c))) < 2:
        return
    found = point([a * factor, b * factor, c * factor])
    assert found == point([a, b, c])
    assert point_of(found.tie) == found
    assert found.tie == Tie.from_equations([[Fraction(a), Fraction(b), Fraction(c)]])


@pytest.mark.parametrize("corner", [(1, 0, 0), (0, 3, 0), (0, 0, -2)])
def test_corners_are_no_ties(corner: tuple[int, int, int]):
    with pytest.raises(TwofoldError, match="zero"):
        _ = point(corner).tie


@pytest.mark.parametrize("text", ["(Q, K, V)", "(Q=K=V)", "(Q=K, V)+", "V = 2K; Q = K"])
def test_other_ties_are_not_on_the_plane(text: str):
    assert point_of(Tie.parse(text)) is None


def test_a_direction_is_that_of_the_equation_solved_for_v():
    assert point_of(Tie.parse("V = 3Q - 2K")).direction == pytest.approx(np.array([3, -2, 1]) / math.sqrt(14))
    assert point_of(Tie.parse("(Q=K, V)")).direction[2] == 0


def test_the_disc_keeps_areas_and_opposite_points_of_the_rim_are_one_tie():
    upper = sphere(4000) * np.array([1, 1, 0])
    upper[:, 2] = np.sqrt(1 - np.minimum((upper**2).sum(axis=1), 1))
    flat = on_disc(upper)
    # A cap of height h has area 2 pi h: as a disc, pi r^2 in units of which the half-sphere is pi.
    assert (flat**2).sum(axis=1) == pytest.approx(1 - upper[:, 2], abs=1e-9)
    rim = point_of(Tie.parse("(Q=K, V)"))
    assert np.linalg.norm(on_disc(rim.direction)) == pytest.approx(1)
    assert angle(rim, Point((1, -1, 0))) == pytest.approx(0, abs=1e-5)
    assert angle(rim, point_of(Tie.parse("K = -Q"))) == pytest.approx(90)


# The covering


def test_the_study_runs_the_covering_and_the_named_ties_are_in_it():
    study = builtin("plane")
    family = [variant.model["tie"] for variant in study.variants if variant.family == "tie"]
    assert family == [str(place.tie) for place in COVERING]
    assert len(family) >= 60
    assert {str(Tie.parse(text)) for text in NAMED} <= set(family)
    assert {str(place.tie) for place in COVERING if place.is_named} >= {
        str(Tie.parse(text)) for text in NAMED if text != "(Q, K, V)"
    }
    assert {task.task for task in study.tasks} == {"text", "recall", "reverse"}
    assert study.variants[0].name == study.reference


def test_the_covering_looks_the_same_from_all_roles_and_signs():
    numbers = {place.numbers for place in COVERING}
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            assert {point([signs[i] * n[order[i]] for i in range(3)]).numbers for n in numbers} == numbers


def test_the_covering_is_as_even_as_it_says():
    directions = np.array([place.direction for place in COVERING])
    nearest = np.degrees(np.arccos(np.minimum(np.abs(sphere(20_000) @ directions.T).max(axis=1), 1)))
    assert 13 < nearest.max() <= 14.1
    apart = [angle(a, b) for a, b in itertools.combinations(COVERING, 2)]
    assert 12.5 <= min(apart) < 12.6


def test_neighbours_have_no_third_one_between_them():
    pairs = set(neighbours(COVERING))
    directions = [place.direction for place in COVERING]
    for i, j in itertools.combinations(range(len(COVERING)), 2):
        other = directions[j] if directions[i] @ directions[j] >= 0 else -directions[j]
        middle = (directions[i] + other) / np.linalg.norm(directions[i] + other)
        radius = math.acos(directions[i] @ middle)
        between = [
            k
            for k in range(len(COVERING))
            if k not in (i, j) and math.acos(min(1.0, abs(float(directions[k] @ middle)))) < radius - 1e-7
        ]
        assert ((i, j) in pairs) is not bool(between)
    # Every tie has some, and one of the rim has them on both of its sides.
    assert {index for pair in pairs for index in pair} == set(range(len(COVERING)))
    rim = next(i for i, place in enumerate(COVERING) if str(place.tie) == "(Q=K, V)")
    near = [COVERING[i + j - rim] for i, j in pairs if rim in (i, j)]
    sides = {float(np.sign(place.direction[0])) for place in near if not place.is_on_rim}
    assert sides == {1.0, -1.0}


# The theorem


def layer(tie: Tie) -> Attention:
    torch.manual_seed(0)
    spec = AttentionSpec(
        tie=tie, hidden_size=12, num_attention_heads=3, num_key_value_heads=3, head_dim=4, causal=True, use_bias=True,
        positions=RotaryPositions(),
    )  # fmt: skip
    return Attention(spec).double()


def scales(place: Point) -> tuple[float, float, float]:
    """Factors of Q, K and the output that make a tie's layer one of the simplest tie of its region."""
    a, b, c = place.numbers
    if not c:
        # The row of K is that of Q times -a/b: both become of one size.
        return math.sqrt(abs(a / b)), math.sqrt(abs(b / a)), 1.0
    p, q = -a / c, -b / c
    if not a or not b:
        return 1.0, 1.0, p or q
    return math.sqrt(abs(p / q)), math.sqrt(abs(q / p)), math.copysign(math.sqrt(abs(p * q)), p)


def rescaled(own: Attention, place: Point) -> Attention:
    """The layer of the simplest tie of the region that should be the same function."""
    query, key, output = scales(place)
    twin = layer(Tie.parse(SIMPLEST[place.region]))
    of_role = {"q_proj": query, "k_proj": key, "v_proj": 1.0}
    with torch.no_grad():
        for name, module in own.named_children():
            if name == "o_proj":
                twin.o_proj.weight.copy_(module.weight * output)
                twin.o_proj.bias.copy_(module.bias)
            else:
                for kind in ("weight", "bias"):
                    getattr(getattr(twin, name), kind).copy_(getattr(module, kind) * of_role[name])
    return twin


@pytest.mark.parametrize("place", COVERING, ids=lambda place: str(place.tie))
def test_a_tie_computes_what_the_simplest_of_its_region_computes(place: Point):
    own = layer(place.tie)
    twin = rescaled(own, place)
    inputs = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(own(inputs), twin(inputs), rtol=1e-9, atol=1e-9)
    assert point_of(Tie.parse(SIMPLEST[place.region])).region is place.region


def test_the_theorem_can_fail():
    """A liar: the same factors do not carry a tie into another region."""
    place = point_of(Tie.parse("V = 2Q + K"))
    own = layer(place.tie)
    twin = rescaled(own, place)
    wrong = layer(Tie.parse("V = Q - K"))
    wrong.load_state_dict(twin.state_dict())
    inputs = torch.randn(2, 5, 12, dtype=torch.float64)
    assert not torch.allclose(own(inputs), wrong(inputs), atol=1e-3)


def test_regions_are_those_of_the_algebra():
    for place in COVERING:
        tie = place.tie
        assert (place.region is Region.VALUE_IS_KEY) == (tie.cached_tensors == 1)
        symmetric = place.region in (Region.EQUAL_QUERY_KEY, Region.OPPOSITE_QUERY_KEY)
        assert symmetric == tie.is_symmetric == place.is_on_rim
        if symmetric:
            assert (tie.query_over_key > 0) == (place.region is Region.EQUAL_QUERY_KEY)
    assert {place.region for place in COVERING} == set(Region)


def test_mirror_images_take_the_same_steps():
    """With -V for V and -W_O for W_O, every gradient is the same or its opposite."""
    pairs = [(place, place.mirror) for place in COVERING if place.mirror]
    assert len(pairs) == 60
    assert all(other.mirror == place and other.region is place.region for place, other in pairs)
    assert all(place.mirror is None for place in COVERING if place.is_on_rim)
    place, other = point_of(Tie.parse("V = 2Q - K")), point_of(Tie.parse("V = -2Q + K"))
    assert place.mirror == other
    own, twin = layer(place.tie), layer(other.tie)
    with torch.no_grad():
        twin.load_state_dict(own.state_dict())
        twin.o_proj.weight.neg_()
    inputs = torch.randn(2, 5, 12, dtype=torch.float64)
    for module in (own, twin):
        module(inputs).square().sum().backward()
    for name, weight in own.named_parameters():
        sign = -1.0 if name == "o_proj.weight" else 1.0
        torch.testing.assert_close(weight.grad, sign * dict(twin.named_parameters())[name].grad)
