"""The law of the difference: known laws are found again, intervals cover as often as they say, and too little data gives no law."""

from __future__ import annotations

import math

import numpy as np
import pytest

from twofold.cost import parameters as parameters_of
from twofold.spec import ModelSpec
from twofold.study import law
from twofold.study import plan as plans
from twofold.study.law import Budget, fit, widening
from twofold.study.statistics import interval, resamples

SIZES = (4_000.0, 9_000.0, 20_000.0)
RATIOS = {SIZES[0]: (5, 20, 80, 320, 640), SIZES[1]: (5, 20, 80, 320), SIZES[2]: (5, 20, 80)}
SIZE_UNIT = float(np.exp(np.log(SIZES).mean()))


def truth(parameters: float, ratio: float, limit: float, amplitude: float, exponent: float, slope: float) -> float:
    return limit + amplitude * (ratio / 5) ** -exponent + slope * math.log(parameters / SIZE_UNIT)


def budgets(*numbers: float, seeds: int = 5, noise: float = 0.0, draw: int = 0, shared: float = 0.5) -> list[Budget]:
    """A part of a seed's noise, ``shared``, is common to all its budgets, as it is where they share first weights and data."""
    rng = np.random.default_rng(draw)
    common = rng.standard_normal(seeds)
    made = []
    for parameters, ratios in RATIOS.items():
        for ratio in ratios:
            own = rng.standard_normal(seeds)
            mean = truth(parameters, ratio, *numbers)
            values = mean + noise * (math.sqrt(shared) * common + math.sqrt(1 - shared) * own)
            made.append(
                Budget(parameters=parameters, tokens=parameters * ratio, differences=dict(enumerate(values.tolist())))
            )
    return made


@pytest.mark.parametrize("slope", [0.0, 0.03])
@pytest.mark.parametrize(("limit", "amplitude", "exponent"), [(0.05, 0.3, 0.4), (0.0, 0.2, 0.9), (0.1, -0.4, 0.25)])
def test_a_law_almost_without_noise_is_found_almost_exactly(limit, amplitude, exponent, slope):
    found = fit(budgets(limit, amplitude, exponent, slope, noise=1e-6))
    assert found is not None
    assert found.has_size or not slope
    assert found.exponent.value == pytest.approx(exponent, abs=1e-4)
    for parameters in SIZES:
        wanted = limit + slope * math.log(parameters / SIZE_UNIT)
        assert found.limit(parameters).value == pytest.approx(wanted, abs=1e-4)
    (held_out,) = found.held_out
    assert held_out.ratio == 640
    assert held_out not in found.fitted
    told = found.prediction(held_out)
    assert told.predicted.value == pytest.approx(told.observed, abs=1e-4)
    assert not found.is_pinned
    assert 0 < found.chi_squared < 6 * found.degrees


def test_a_law_with_noise_has_intervals_that_are_the_same_each_time():
    numbers = (0.05, 0.3, 0.4, 0.0)
    one, two = (fit(budgets(*numbers, noise=0.01)) for _ in range(2))
    assert one is not None
    assert two is not None
    assert one.limit(SIZES[0]) == two.limit(SIZES[0])
    limit = one.limit(SIZES[0])
    assert limit.low < limit.value < limit.high
    assert one.at(SIZES[0], 1e12).value == pytest.approx(limit.value, abs=1e-3)
    assert one.coefficients.shape == (3 + one.has_size - 1, 1 + 5**5)
    wider = fit(budgets(*numbers, noise=0.1))
    assert wider is not None
    assert wider.limit(SIZES[0]).high - wider.limit(SIZES[0]).low > 2 * (limit.high - limit.low)


def test_the_held_out_ratio_does_not_move_the_law():
    known = budgets(0.05, 0.3, 0.4, 0.0, noise=0.01, draw=1)
    other = [
        Budget(parameters=b.parameters, tokens=b.tokens, differences={seed: v + 9 for seed, v in b.differences.items()})
        if b.ratio == 640
        else b
        for b in known
    ]
    one, two = fit(known), fit(other)
    assert one is not None
    assert two is not None
    assert one.limit(SIZES[0]) == two.limit(SIZES[0])
    assert one.prediction(one.held_out[0]).is_inside
    assert not two.prediction(two.held_out[0]).is_inside


def test_a_difference_that_does_not_depend_on_the_budget_is_its_own_limit():
    found = fit(budgets(0.2, 0.0, 0.5, 0.0, noise=0.002))
    assert found is not None
    assert found.at(SIZES[0], 300).value == pytest.approx(0.2, abs=0.01)


def test_budgets_that_follow_no_such_law_are_noticed():
    def bent(budget: Budget) -> Budget:
        """Up, and down again."""
        added = 0.3 * (budget.ratio == 20)
        return Budget(
            parameters=budget.parameters,
            tokens=budget.tokens,
            differences={seed: value + added for seed, value in budget.differences.items()},
        )

    known = budgets(0.05, 0.3, 0.4, 0.0, noise=0.01)
    straight, misfit = fit(known), fit(list(map(bent, known)))
    assert straight is not None
    assert misfit is not None
    assert not straight.is_misfit
    assert misfit.is_misfit


def test_too_little_gives_no_law():
    known = budgets(0.05, 0.3, 0.4, 0.0, noise=0.01)
    assert fit([]) is None
    assert fit(known[:5]) is None
    assert fit([b for b in known if b.ratio in (5, 20, 640)]) is None
    assert fit([Budget(parameters=b.parameters, tokens=b.tokens, differences={}) for b in known]) is None
    apart = [
        Budget(parameters=b.parameters, tokens=b.tokens, differences={number: 0.1}) for number, b in enumerate(known)
    ]
    assert fit(apart) is None


def test_one_seed_gives_a_law_without_intervals():
    found = fit(budgets(0.05, 0.3, 0.4, 0.0, seeds=1, noise=0.001))
    assert found is not None
    limit = found.limit(SIZES[0])
    assert math.isfinite(limit.value)
    assert math.isnan(limit.low)
    assert not limit.holds_zero
    assert not found.prediction(found.held_out[0]).is_inside


def test_seeds_that_a_budget_lacks_are_left_out_of_all():
    known = budgets(0.05, 0.3, 0.4, 0.0, noise=0.01)
    short = Budget(
        parameters=known[0].parameters, tokens=known[0].tokens, differences={0: 0.3, 1: 0.3, 2: 0.35, 9: 99.0}
    )
    found = fit([short, *known[1:]])
    assert found is not None
    assert found.seeds == (0, 1, 2)
    assert known[0].observed.n == 5


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_interval_of_a_mean_covers_what_it_says_where_percentiles_do_not(seeds):
    """Of a bootstrap's mean, the interval is Student's; its percentiles end at the most extreme seed."""
    rng = np.random.default_rng(0)
    draws, _ = resamples(seeds)
    hits = {"percentiles": 0, "ours": 0}
    for values in rng.standard_normal((1000, seeds)):
        means = values[draws].mean(axis=1)
        hits["percentiles"] += means.min() <= 0 <= means.max()
        half = widening(seeds) * means.std()
        hits["ours"] += abs(values.mean()) <= half
        shown = interval(list(values))
        assert half == pytest.approx((shown.high - shown.low) / 2)
    assert hits["percentiles"] < 960 - 200 * (seeds < 5)
    assert 930 < hits["ours"] < 970


@pytest.mark.long
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("slope", [0.0, 0.05])
def test_intervals_of_limit_and_prediction_cover_what_they_say(slope, seeds):
    limit, amplitude, exponent, trials = 0.05, 0.3, 0.5, 200
    hits = {"limit": 0, "held out": 0}
    for draw in range(trials):
        found = fit(budgets(limit, amplitude, exponent, slope, noise=0.02, draw=draw, seeds=seeds))
        assert found is not None
        wanted = limit + slope * math.log(found.largest / SIZE_UNIT)
        own = found.limit(found.largest)
        hits["limit"] += own.low <= wanted <= own.high
        hits["held out"] += found.prediction(found.held_out[0]).is_inside
    assert hits["limit"] >= (0.9 if seeds == 5 else 0.86) * trials, hits
    assert hits["held out"] >= 0.9 * trials, hits


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_misfit_is_found_by_chance_as_seldom_as_is_said(seeds):
    """Noise of a law's own points, whose variances are estimated from a few seeds: a χ² of the tables would call one in ten of five seeds a misfit."""
    chances = [
        one.chance
        for draw in range(40)
        if (one := fit(budgets(0.05, 0.3, 0.5, 0.0, noise=0.05, shared=0.0, seeds=seeds, draw=draw)))
    ]
    assert len(chances) == 40
    assert sum(chance < law.MISFIT for chance in chances) <= 3
    assert np.mean(chances) == pytest.approx(0.5, abs=0.15)


def test_the_range_of_exponents_is_the_one_that_is_told():
    assert (law.EXPONENTS[0], law.EXPONENTS[-1]) == pytest.approx((0.1, 2.0))


def test_the_built_in_study_trains_each_budget_for_what_it_is_called():
    """Its steps are counted for (Q, K, V)'s parameters, and its law has a held-out ratio and enough points."""
    for name in ("budget", "budget-gpu"):
        study_plan = plans.builtin(name)
        made = []
        for task in study_plan.planned_tasks:
            if "size" not in task.points:
                continue
            spec = ModelSpec.from_dict(
                {**study_plan.model, "architecture": "causal_lm", "vocab_size": 256, "causal": True, **task.model}
            )
            tokens = task.training["steps"] * task.training["batch_size"] * task.options["context"]
            assert tokens / parameters_of(spec) == pytest.approx(int(task.points["ratio"].removeprefix("r")), rel=0.02)
            assert task.training["warmup_steps"] == pytest.approx(task.training["steps"] / 10, abs=1)
            differences = dict.fromkeys(study_plan.seeds, 0.1)
            made.append(Budget(parameters=parameters_of(spec), tokens=tokens, differences=differences))
        found = fit(made)
        assert found is not None
        assert len(found.seeds) >= 5
        assert len({budget.parameters for budget in found.fitted}) == 3
        assert len(found.held_out) == 1
