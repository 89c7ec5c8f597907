"""A law for the difference between two variants, over model sizes and budgets of tokens, fitted to the paired differences themselves.

With N parameters (the reference's), D tokens and r = D/N:

    ΔL(N, r) = a + b (r/r₀)^-β + s ln(N/N₀)          r₀ the smallest ratio, N₀ the geometric mean of the sizes

Two losses that each follow E + A N^-α + B D^-β' differ by ΔE + ΔA N^-α + ΔB D^-β' if they share their exponents: a limit, a part that falls as
a model is trained longer, and a part that moves with size. A dozen points over three sizes do not decide five numbers, so what is left of the
two powers is one power of r, whose limit r → ∞ is the question asked of an under-trained model, and the slope of a slow change with size.
The slope is kept only where Akaike's corrected criterion says that it pays for itself; without it s is 0.

Given β the law is linear. So β is searched, from 0.1 to 2, and the rest is weighted least squares: no start to choose, no other minimum to
fall into. Weights are one over the variance of a point's mean over seeds; variances of a handful of seeds are drawn halfway to their geometric
mean over all points, lest a point that is alike by chance decide everything. Such weights make χ² larger than its name says (a third larger with
five seeds), so it is held against χ² of noise alone, weighted by variances of as few seeds.

Whole seeds are resampled, the same for all points, because a seed's runs share first weights and the order of their data. Percentiles of so few
seeds end at the most extreme one and are far too narrow (of three seeds they hold six truths in ten), so an interval's part on each side
is Student's t times how far resamples lie on that side, in root mean square.

Sources: Hoffmann et al. 2022 (2203.15556) for the form of each loss; Golub and Pereyra 2003 for the search of β alone; Smyth 2004 for drawing
variances together; Hurvich and Tsai 1989 for the criterion; Hesterberg 2015 (The American Statistician 69(4)) for how narrow a
bootstrap of few values is, and for Student's t with its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from twofold.study.statistics import PairedDifference, paired_difference, resamples

Array = NDArray[np.float64]

EXPONENTS = np.geomspace(0.1, 2.0, 100)
SAME_RATIO = 0.8  # steps are whole, so one ratio is not quite the same for all sizes
MIN_POINTS = 5
MISFIT = 0.01
CHANCES = 2_000


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a size was trained for: N ``parameters``, D ``tokens``, and a variant's loss minus the reference's by seed."""

    parameters: float
    tokens: float
    differences: Mapping[int, float]

    @property
    def ratio(self) -> float:
        """Tokens per parameter."""
        return self.tokens / self.parameters

    @property
    def observed(self) -> PairedDifference:
        """The mean difference with its interval over seeds."""
        return paired_difference(self.differences, dict.fromkeys(self.differences, 0.0))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its bootstrap interval; NaN ends where there are fewer than 2 seeds."""

    value: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        """Whether 0 lies in the interval; False where there is none."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the law says of a budget that it did not see, with the interval for the mean of as many seeds, and what was seen."""

    budget: Budget
    predicted: Estimate
    observed: float

    @property
    def is_inside(self) -> bool:
        """Whether what was seen lies in the interval."""
        return self.predicted.low <= self.observed <= self.predicted.high


@dataclass(frozen=True, kw_only=True)
class Law:
    """A fitted law. ``fitted`` are the budgets that it saw, ``held_out`` those of the largest ratio, which it did not.

    ``chi_squared`` is the weighted sum of squares over ``degrees`` of freedom, and ``chance`` how often noise alone gives one as large (NaN: one
    seed, of which no noise is known). ``coefficients`` [K, 1 + R] are a, b and, where
    ``has_size``, s: the fit's own first, then those of R resamples; ``exponents`` [1 + R] are their β.
    """

    fitted: tuple[Budget, ...]
    held_out: tuple[Budget, ...]
    seeds: tuple[int, ...]
    has_size: bool
    criterion: float
    other_criterion: float
    chi_squared: float
    degrees: int
    chance: float
    coefficients: Array = field(repr=False)
    exponents: Array = field(repr=False)
    draws: NDArray[np.int64] = field(repr=False)

    @property
    def exponent(self) -> Estimate:
        """β, whose interval ends where the search does."""
        found = self._estimate(self.exponents)
        low, high = (float(np.clip(end, EXPONENTS[0], EXPONENTS[-1])) for end in (found.low, found.high))
        return Estimate(value=found.value, low=low, high=high)

    @property
    def is_pinned(self) -> bool:
        """Whether β is at an end of its range: the points do not say how fast the difference settles."""
        return not EXPONENTS[0] * 1.001 < self.exponents[0] < EXPONENTS[-1] * 0.999

    @property
    def is_misfit(self) -> bool:
        """Whether the budgets lie farther from the law than their noise allows: a χ² that noise alone gives less than once in a hundred."""
        return self.chance < MISFIT

    @property
    def largest(self) -> float:
        """The largest size that was fitted."""
        return max(budget.parameters for budget in self.fitted)

    def limit(self, parameters: float) -> Estimate:
        """The difference that is left at that size when tokens have no end; of a law without a slope the same for all sizes."""
        return self.at(parameters, math.inf)

    def at(self, parameters: float, ratio: float) -> Estimate:
        """The law's own value, with the interval of the fit: no noise of another measurement is in it."""
        return self._estimate(self._values(parameters, ratio))

    def prediction(self, budget: Budget) -> Prediction:
        """A budget's mean over seeds beside what the law says of it.

        The interval is for observation minus law over the resamples, so it holds the noise of both, and what they share.
        """
        values = self._values(budget.parameters, budget.ratio)
        differences = np.array([budget.differences[seed] for seed in self.seeds])
        observed, centre, n = float(differences.mean()), float(values[0]), len(self.seeds)
        half = math.nan
        if n > 1:
            errors = differences[self.draws].mean(axis=1) - values[1:]
            half = widening(n) * float(errors.std())
        return Prediction(
            budget=budget,
            predicted=Estimate(value=centre, low=centre - half, high=centre + half),
            observed=observed,
        )

    def _values(self, parameters: float, ratio: float) -> Array:
        units = _units(self.fitted)
        falling = np.zeros_like(self.exponents) if math.isinf(ratio) else (ratio / units[0]) ** -self.exponents
        values = self.coefficients[0] + self.coefficients[1] * falling
        return values + self.coefficients[2] * math.log(parameters / units[1]) if self.has_size else values

    def _estimate(self, values: Array) -> Estimate:
        centre, again = float(values[0]), values[1:]
        if not len(again):
            return Estimate(value=centre, low=math.nan, high=math.nan)
        below, above = (math.sqrt(2 * float((np.maximum(sign * (again - centre), 0) ** 2).mean())) for sign in (-1, 1))
        wide = widening(len(self.seeds))
        return Estimate(value=centre, low=centre - wide * below, high=centre + wide * above)


def widening(n: int, *, confidence: float = 0.95) -> float:
    """By how many of a bootstrap's standard errors the t interval of a mean of ``n`` values reaches to either side.

    >>> [round(widening(n), 2) for n in (2, 3, 5, 1000)]
    [17.97, 5.27, 3.1, 1.96]
    """
    return float(stats.t.ppf((1 + confidence) / 2, n - 1)) * math.sqrt(n / (n - 1))


def fit(budgets: Sequence[Budget]) -> Law | None:
    """The law of all budgets but those of the largest ratio, over the seeds that all of them hold; None where these are too few.

    Too few are fewer than 5 points, 3 different ratios or 1 seed.
    """
    known = [budget for budget in budgets if budget.differences]
    if not known:
        return None
    seeds = tuple(sorted(set.intersection(*(set(budget.differences) for budget in known))))
    largest = max(budget.ratio for budget in known)
    fitted = tuple(budget for budget in known if budget.ratio < SAME_RATIO * largest)
    if len(fitted) < MIN_POINTS or _count(budget.ratio for budget in fitted) < 3 or not seeds:
        return None
    table = np.array([[budget.differences[seed] for seed in seeds] for budget in fitted])
    variances = _variances(table)
    draws = resamples(len(seeds))[0] if len(seeds) > 1 else np.empty((0, 1), dtype=np.int64)
    means = np.column_stack([table.mean(axis=1), table[:, draws].mean(axis=2)])

    forms = [has_size for has_size in (False, True) if _is_affordable(fitted, has_size)]
    of_form = {has_size: _solve(fitted, means[:, :1], variances, has_size=has_size) for has_size in forms}
    degrees = {has_size: len(fitted) - len(c) - 1 for has_size, (c, _, _) in of_form.items()}
    noise = {has_size: _noise(fitted, form[1][0], table, has_size=has_size) for has_size, form in of_form.items()}
    criteria = {
        has_size: _criterion(chi[0] * degrees[has_size] / noise[has_size].mean(), len(fitted), len(c) + 1)
        for has_size, (c, _, chi) in of_form.items()
    }
    has_size = min(criteria, key=criteria.__getitem__)
    coefficients, exponents, chi = of_form[has_size]
    again = _solve(fitted, means[:, 1:], variances, has_size=has_size, refine=False)
    return Law(
        fitted=fitted,
        held_out=tuple(budget for budget in known if budget not in fitted),
        seeds=seeds,
        has_size=has_size,
        criterion=criteria[has_size],
        other_criterion=criteria.get(not has_size, math.nan),
        chi_squared=float(chi[0]),
        degrees=degrees[has_size],
        chance=float((noise[has_size] >= chi[0]).mean()) if len(noise[has_size]) > 1 else math.nan,
        coefficients=np.column_stack([coefficients, again[0]]),
        exponents=np.concatenate([exponents, again[1]]),
        draws=draws,
    )


def _count(values: Iterable[float]) -> int:
    """How many different ratios or sizes there are."""
    found: list[float] = []
    for value in sorted(values):
        if not found or value * SAME_RATIO > found[-1]:
            found.append(value)
    return len(found)


def _is_affordable(budgets: Sequence[Budget], has_size: bool) -> bool:
    """Whether a form has few enough numbers for its points: two of a criterion's denominators must stay positive."""
    numbers = 4 if has_size else 3
    return len(budgets) > numbers + 1 and (not has_size or _count(budget.parameters for budget in budgets) > 2)


def _criterion(chi_squared: float, points: int, numbers: int) -> float:
    """Akaike's corrected criterion for known variances; the smaller the better."""
    return chi_squared + 2 * numbers + 2 * numbers * (numbers + 1) / (points - numbers - 1)


def _units(budgets: Sequence[Budget]) -> tuple[float, float]:
    """r₀ and N₀."""
    sizes = np.unique([budget.parameters for budget in budgets])
    return min(budget.ratio for budget in budgets), float(np.exp(np.log(sizes).mean()))


def _variances(table: Array) -> Array:
    """Of each point's mean over seeds, from ``table`` [..., points, seeds]; all 1 where nothing is known of them."""
    seeds = table.shape[-1]
    own = table.var(axis=-1, ddof=1) if seeds > 1 else np.zeros(table.shape[:-1])
    if not (own > 0).all():
        return np.ones(table.shape[:-1])
    return (own + np.exp(np.log(own).mean(axis=-1, keepdims=True))) / 2 / seeds


def _noise(budgets: Sequence[Budget], exponent: float, table: Array, *, has_size: bool) -> Array:
    """χ² of noise alone around a law with that β, [CHANCES], weighted as the points of ``table`` are; the degrees of freedom where no noise is known.

    With true variances it would be the χ² of the tables. Near its minimum the law is linear in β too.
    """
    design = _design(budgets, exponent, has_size=has_size)
    design = np.column_stack([design, design[:, 1] * np.log(design[:, 1])])
    if (_variances(table) == 1).all():
        return np.array([float(len(budgets) - design.shape[1])])
    drawn = np.random.default_rng(0).standard_normal((CHANCES, *table.shape))
    weights = 1 / np.sqrt(_variances(drawn))
    wanted, (basis, _) = drawn.mean(axis=-1) * weights, np.linalg.qr(design * weights[..., None])
    left = wanted - (basis @ (basis.swapaxes(-1, -2) @ wanted[..., None]))[..., 0]
    found: Array = (left**2).sum(axis=-1)
    return found


def _design(budgets: Sequence[Budget], exponent: float, *, has_size: bool) -> Array:
    """[points, K]: 1, (r/r₀)^-β and, where there is one, ln(N/N₀)."""
    ratio_unit, size_unit = _units(budgets)
    ratios = np.array([budget.ratio for budget in budgets])
    columns = [np.ones(len(budgets)), (ratios / ratio_unit) ** -exponent]
    if has_size:
        columns.append(np.log(np.array([budget.parameters for budget in budgets]) / size_unit))
    return np.column_stack(columns)


def _solve(
    budgets: Sequence[Budget], means: Array, variances: Array, *, has_size: bool, refine: bool = True
) -> tuple[Array, Array, Array]:
    """Coefficients [K, R], exponents [R] and weighted sums of squares [R] for each column of ``means`` [points, R]."""
    weights = 1 / np.sqrt(variances)
    wanted = means * weights[:, None]

    def linear(exponent: float) -> tuple[Array, Array]:
        design = _design(budgets, exponent, has_size=has_size) * weights[:, None]
        coefficients = np.linalg.pinv(design) @ wanted
        return coefficients, ((wanted - design @ coefficients) ** 2).sum(axis=0)

    best, chi = linear(EXPONENTS[0])
    exponents = np.full(means.shape[1], EXPONENTS[0])
    for exponent in EXPONENTS[1:]:
        coefficients, own = linear(exponent)
        better = own < chi
        best[:, better], exponents[better], chi[better] = coefficients[:, better], exponent, own[better]
    if refine:
        for column, start in enumerate(exponents):
            place = int(np.argmin(np.abs(EXPONENTS - start)))
            ends = EXPONENTS[max(place - 1, 0)], EXPONENTS[min(place + 1, len(EXPONENTS) - 1)]
            found = optimize.minimize_scalar(
                lambda value, column=column: linear(value)[1][column], bounds=ends, method="bounded",
                options={"xatol": 1e-10},
            )  # fmt: skip
            coefficients, own = linear(float(found.x))
            if own[column] < chi[column]:
                best[:, column], exponents[column], chi[column] = coefficients[:, column], found.x, own[column]
    return best, exponents, chi
