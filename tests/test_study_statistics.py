"""Intervals that cover what they say, differences that are paired, and a frontier that agrees with brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from twofold.report.budgets import alike
from twofold.study.statistics import (
    best_frequency,
    front_frequency,
    interval,
    paired_difference,
    pareto_front,
    unseen_share,
)

SEEDS = 3
STUDIES = 2000


def differences() -> np.ndarray:
    """Paired differences of STUDIES studies of SEEDS seeds whose true mean is 0.3."""
    return 0.3 + np.random.default_rng(0).standard_normal((STUDIES, SEEDS))


def share(covered: list[bool]) -> float:
    return sum(covered) / len(covered)


def test_the_t_interval_of_three_seeds_covers_95_per_cent_and_the_bootstrap_far_less():
    found = [paired_difference(dict(enumerate(row)), dict.fromkeys(range(SEEDS), 0.0)) for row in differences()]
    # Four standard errors of a share of 2,000: 0.02.
    assert share([d.low <= 0.3 <= d.high for d in found]) == pytest.approx(0.95, abs=0.02)
    assert share([d.bootstrap_low <= 0.3 <= d.bootstrap_high for d in found]) < 0.85
    assert share([d.excludes_zero for d in found]) < 0.2


def test_of_outcomes_of_two_kinds_the_interval_misses_one_mean_in_four():
    """Half of the models learn a task: three seeds of one kind have an interval without width."""
    draw = np.random.default_rng(2)
    learned = (draw.random((STUDIES, SEEDS)) < 0.5) + 0.01 * draw.standard_normal((STUDIES, SEEDS))
    found = [interval(row.tolist()) for row in learned]
    assert share([shown.low <= 0.5 <= shown.high for shown in found]) == pytest.approx(0.75, abs=0.04)
    # What may be said of seeds that are all alike: a rarer kind than this would have been missed with 95%.
    for n in (3, 5):
        missed = (draw.random((STUDIES, n)) >= unseen_share(n)).all(axis=1)
        assert missed.mean() == pytest.approx(0.05, abs=0.02)


def test_pairing_narrows_what_seeds_share():
    draw = np.random.default_rng(1)
    seed_effect, noise = draw.standard_normal(5), 0.01 * draw.standard_normal(5)
    a = {seed: float(seed_effect[seed] + 0.1 + noise[seed]) for seed in range(5)}
    b = {seed: float(seed_effect[seed]) for seed in range(5)}
    paired, alone = paired_difference(a, b), interval(list(a.values()))
    assert paired.excludes_zero
    assert paired.high - paired.low < 0.05 * (alone.high - alone.low)
    assert paired.method == "95% paired t interval over 5 seeds"
    assert paired.bootstrap_method == "95% percentile bootstrap over 5 paired seeds, all 3125 resamples"
    assert paired.bootstrap_low == pytest.approx(paired.mean, abs=0.02)


def test_the_t_interval_is_the_textbooks():
    found = interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)  # t(0.975, 2) of a table, s = 1
    assert (found.mean, found.n) == (2.0, 3)
    assert (found.low, found.high) == (pytest.approx(2 - half), pytest.approx(2 + half))
    assert interval([1.0, 2.0, 3.0], confidence=0.9).method == "90% t interval over 3 seeds"
    assert interval([1.0, 2.0, 3.0], confidence=0.9).high < found.high


def test_one_seed_or_none_has_no_interval():
    one, none = interval([2.0]), interval([])
    assert (one.mean, one.n, one.method) == (2.0, 1, "no interval: 1 seed")
    assert math.isnan(one.low)
    assert (none.n, none.method) == (0, "no interval: 0 seeds")
    assert math.isnan(none.mean)
    apart = paired_difference({0: 1.0, 1: 2.0}, {1: 1.5, 2: 9.0})
    assert (apart.n, apart.mean) == (1, 0.5)
    assert math.isnan(apart.low)
    assert math.isnan(apart.bootstrap_high)
    assert not apart.excludes_zero


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_that_diverged_has_no_place_in_a_mean(value: float):
    with pytest.raises(ValueError, match="finite"):
        interval([1.0, value])


def test_many_seeds_are_resampled_at_random_and_alike_every_time():
    values = {seed: float(seed % 4) for seed in range(8)}
    zero = dict.fromkeys(range(8), 0.0)
    first = paired_difference(values, zero)
    assert first == paired_difference(values, zero)
    assert first.bootstrap_method.endswith("8 paired seeds, 4000 resamples")


small = st.integers(-3, 3).map(float)
points = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=2), st.tuples(small, small), max_size=9)


def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other


@given(points, st.booleans())
def test_the_frontier_is_what_brute_force_finds(given_points: dict[str, tuple[float, float]], higher_is_better: bool):
    front = pareto_front(given_points, higher_is_better=higher_is_better)
    sign = -1 if higher_is_better else 1
    signed = {name: (cost, sign * value) for name, (cost, value) in given_points.items()}
    wanted = {name for name, point in signed.items() if not any(beats(other, point) for other in signed.values())}
    assert set(front) == wanted
    assert len(front) == len(wanted)
    assert [signed[name][0] for name in front] == sorted(signed[name][0] for name in front)


@given(points)
def test_a_point_that_diverged_is_on_no_frontier(given_points: dict[str, tuple[float, float]]):
    assume("nan" not in given_points)
    with_nan = {**given_points, "nan": (-9.0, math.nan), "inf": (-9.0, math.inf)}
    assert pareto_front(with_nan) == pareto_front(given_points)


def test_how_often_a_variant_is_on_the_frontier_is_counted_over_all_resamples():
    values = {
        "cheap": {0: 2.0, 1: 2.0, 2: 2.0},
        "sure": {0: 1.0, 1: 1.0, 2: 1.0},
        "shaky": {0: 0.0, 1: 3.0, 2: 3.0},  # better than "sure" only where seed 0 was drawn twice or more, or alone
        "beaten": {0: 5.0, 1: 5.0, 2: 5.0},
    }
    costs = {"cheap": 1.0, "sure": 2.0, "shaky": 3.0, "beaten": 3.0}
    found = front_frequency(values, costs)
    draws = list(itertools.product(range(3), repeat=3))
    wanted = sum(np.mean([values["shaky"][seed] for seed in draw]) < 1.0 for draw in draws) / len(draws)
    assert found == {"cheap": 1.0, "sure": 1.0, "shaky": pytest.approx(wanted), "beaten": 0.0}
    assert 0 < wanted < 0.5
    flipped = front_frequency(
        {name: {s: -v for s, v in by_seed.items()} for name, by_seed in values.items()}, costs, higher_is_better=True
    )
    assert flipped == found


def test_how_often_a_variant_is_the_best_is_counted_over_all_resamples():
    values = {
        "sure": {0: 1.0, 1: 1.0, 2: 1.0}, "twin": {0: 1.0, 1: 1.0, 2: 1.0}, "shaky": {0: 0.0, 1: 3.5, 2: 3.5},
        "beaten": {0: 5.0, 1: 5.0, 2: 5.0},
    }  # fmt: skip
    found = best_frequency(values)
    draws = list(itertools.product(range(3), repeat=3))
    wanted = sum(np.mean([values["shaky"][seed] for seed in draw]) < 1.0 for draw in draws) / len(draws)
    assert found == pytest.approx({"sure": (1 - wanted) / 2, "twin": (1 - wanted) / 2, "shaky": wanted, "beaten": 0.0})
    assert sum(found.values()) == pytest.approx(1.0)
    assert best_frequency({}) == {}
    assert math.isnan(best_frequency({"a": {0: 1.0, 1: 2.0}, "b": {1: 1.0}})["a"])


def test_of_two_that_are_alike_one_is_often_the_best_in_all_resamples():
    """What the report says beside its shares: 100% of the resamples of 3 seeds is no certainty."""
    sure = []
    for row in differences() - 0.3:
        found = best_frequency({"a": dict.fromkeys(range(SEEDS), 0.0), "b": dict(enumerate(row.tolist()))})
        sure.append(max(found.values()) == 1.0)
    assert share(sure) == pytest.approx(alike(SEEDS), abs=0.04)


def test_one_shared_seed_says_nothing_of_chance():
    found = front_frequency({"a": {0: 1.0, 1: 2.0}, "b": {1: 1.0}}, {"a": 1.0, "b": 2.0})
    assert all(math.isnan(value) for value in found.values())
    assert front_frequency({}, {}) == {}
