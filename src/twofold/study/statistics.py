"""Intervals, paired differences and frontiers: what may be said of a handful of seeds.

Seeds are few, so the interval to show is Student's t, which pays for estimating the spread from n values; a percentile bootstrap of
three values is too narrow (a test measures both coverages). It takes values to lie around their mean: of outcomes that come in two kinds, learned or
not, three seeds may all be of one, and the interval misses the mean one time in four. Nothing here knows of files or torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

MAX_EXACT_RESAMPLES = 5000
RESAMPLES = 4000
QUANTILES = 20_000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its interval over ``n`` seeds; ``low`` and ``high`` are NaN where n < 2. ``method`` says how it was made, to be printed."""

    mean: float
    low: float
    high: float
    n: int
    method: str


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """The mean of a - b over the ``n`` seeds that both hold.

    ``low`` and ``high`` are the paired t interval, the one to show; the bootstrap stands beside it. All four are NaN where n < 2.
    """

    mean: float
    low: float
    high: float
    n: int
    method: str
    bootstrap_low: float
    bootstrap_high: float
    bootstrap_method: str

    @property
    def excludes_zero(self) -> bool:
        """Whether the shown interval lies on one side of 0; False where there is no interval."""
        return self.low > 0 or self.high < 0


def interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """The mean of ``values`` with its t interval: mean ± t(n-1)·s/√n, s being the sample's standard deviation.

    Values that are not finite are an error of the caller: a run that diverged has no place in a mean.
    Source: Student, "The probable error of a mean", 1908.
    """
    numbers = np.asarray(list(values), dtype=np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError("An interval needs finite values: leave out runs that failed and say so.")
    n = len(numbers)
    percent = f"{confidence:.0%}"
    if n < 2:
        mean = float(numbers[0]) if n else math.nan
        return Interval(mean=mean, low=math.nan, high=math.nan, n=n, method=f"no interval: {n} seed{'s' * (n != 1)}")
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * numbers.std(ddof=1) / math.sqrt(n))
    mean = float(numbers.mean())
    return Interval(mean=mean, low=mean - half, high=mean + half, n=n, method=f"{percent} t interval over {n} seeds")


def paired_difference(
    a_by_seed: Mapping[int, float], b_by_seed: Mapping[int, float], *, confidence: float = 0.95
) -> PairedDifference:
    """The mean of a - b over the seeds that both hold, with the paired t and the percentile bootstrap interval.

    Runs that share a seed share initial tensors and data order, so their difference varies less than either.
    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13, for the percentile interval.
    """
    seeds = sorted(set(a_by_seed) & set(b_by_seed))
    differences = np.array([a_by_seed[seed] - b_by_seed[seed] for seed in seeds], dtype=np.float64)
    shown = interval(list(differences), confidence=confidence)
    if len(seeds) < 2:
        low = high = math.nan
        bootstrap_method = shown.method
    else:
        draws, how = resamples(len(seeds))
        means = differences[draws].mean(axis=1)
        low, high = (float(np.quantile(means, share)) for share in ((1 - confidence) / 2, (1 + confidence) / 2))
        bootstrap_method = f"{confidence:.0%} percentile bootstrap over {len(seeds)} paired seeds, {how}"
    method = shown.method.replace("t interval over", "paired t interval over")
    return PairedDifference(
        mean=shown.mean, low=shown.low, high=shown.high, n=shown.n, method=method,
        bootstrap_low=low, bootstrap_high=high, bootstrap_method=bootstrap_method,
    )  # fmt: skip


def detectable_difference(deviation: float, n: int, *, power: float = 0.8, confidence: float = 0.95) -> float:
    """The smallest true mean of n paired differences of standard deviation ``deviation`` whose t interval excludes zero with probability ``power``.

    NaN where n < 2. The statistic follows a noncentral t with n - 1 degrees of freedom and noncentrality δ·√n / deviation; at large n this is
    the well-known (1.96 + 0.84)·deviation/√n.
    Source: Cohen, "Statistical Power Analysis for the Behavioral Sciences", 1988, chapter 2.

    >>> round(detectable_difference(0.01, 1_000_000) * 1000 / 0.01, 3), round(detectable_difference(0.01, 3), 4)
    (2.802, 0.0326)
    """
    if n < 2 or not math.isfinite(deviation):
        return math.nan
    return _noncentrality(n, power, confidence) * deviation / math.sqrt(n)


@cache
def _noncentrality(n: int, power: float, confidence: float) -> float:
    """The mean, in standard errors, that n values show with probability ``power``.

    The sample's deviation is averaged out over its quantiles, which is exact to four digits and holds for two values too (SciPy's noncentral t
    gives NaN there).
    """
    quantiles = (np.arange(QUANTILES) + 0.5) / QUANTILES
    thresholds = stats.t.ppf((1 + confidence) / 2, n - 1) * np.sqrt(stats.chi2.ppf(quantiles, n - 1) / (n - 1))

    def surplus(noncentrality: float) -> float:
        seen = stats.norm.cdf(noncentrality - thresholds) + stats.norm.cdf(-noncentrality - thresholds)
        return float(seen.mean()) - power

    return float(optimize.brentq(surplus, 0.0, 10 * thresholds.max()))


def unseen_share(n: int, *, confidence: float = 0.95) -> float:
    """The largest share of seeds that come out in another way, of which ``n`` seeds that are all alike give no sign, with that confidence.

    Student's t cannot know of it: its interval for values that are alike has no width.
    Source: Clopper and Pearson 1934, for no success in n trials.

    >>> round(unseen_share(3), 2), round(unseen_share(5), 2)
    (0.63, 0.45)
    """
    return float(1 - (1 - confidence) ** (1 / n))


def share_error(share: float, count: int) -> float:
    """The standard error of a share of right answers over ``count`` examples, √(p(1 - p)/count); NaN without examples.

    Where an example gives several answers this is an upper bound: a mean of values between 0 and 1 varies at most as much as one of zeros and ones.

    >>> share_error(0.5, 400)
    0.025
    """
    return math.sqrt(max(share * (1 - share), 0.0) / count) if count else math.nan


def pareto_front(points: Mapping[str, tuple[float, float]], *, higher_is_better: bool = False) -> list[str]:
    """Names of the points (cost, value) that no other point beats, in order of cost.

    A point is beaten by one that is no worse in both and better in one; points that are equal in both stand or fall together.
    """
    sign = -1.0 if higher_is_better else 1.0
    ordered = sorted((cost, sign * value, name) for name, (cost, value) in points.items() if math.isfinite(value))
    front: list[str] = []
    best, best_cost = math.inf, math.nan
    for cost, loss, name in ordered:
        if loss < best or (loss == best and cost == best_cost):
            front.append(name)
            best, best_cost = loss, cost
    return front


def front_frequency(
    values: Mapping[str, Mapping[int, float]], costs: Mapping[str, float], *, higher_is_better: bool = False
) -> dict[str, float]:
    """The share of bootstrap resamples over seeds in which each variant's mean is on the Pareto front.

    Each resample draws seeds, the same for all variants, from those that every variant holds. NaN for all where these are fewer
    than 2, because one seed says nothing about chance.
    """
    names = list(values)
    shared = sorted(set.intersection(*(set(by_seed) for by_seed in values.values()))) if names else []
    if len(shared) < 2:
        return dict.fromkeys(names, math.nan)
    table = np.array([[values[name][seed] for seed in shared] for name in names], dtype=np.float64)
    draws, _ = resamples(len(shared))
    counts = dict.fromkeys(names, 0)
    for means in table[:, draws].mean(axis=2).T:
        points = {name: (costs[name], float(mean)) for name, mean in zip(names, means, strict=True)}
        for name in pareto_front(points, higher_is_better=higher_is_better):
            counts[name] += 1
    return {name: count / len(draws) for name, count in counts.items()}


def best_frequency(values: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """The share of bootstrap resamples over seeds in which each variant's mean is the lowest; those that tie share the resample.

    Seeds are drawn as in :func:`front_frequency`, and NaN for all means the same.
    """
    names = list(values)
    shared = sorted(set.intersection(*(set(by_seed) for by_seed in values.values()))) if names else []
    if len(shared) < 2:
        return dict.fromkeys(names, math.nan)
    table = np.array([[values[name][seed] for seed in shared] for name in names], dtype=np.float64)
    draws, _ = resamples(len(shared))
    means = table[:, draws].mean(axis=2)
    is_best = means == means.min(axis=0)
    shares = (is_best / is_best.sum(axis=0)).mean(axis=1)
    return dict(zip(names, shares.tolist(), strict=True))


def resamples(n: int) -> tuple[NDArray[np.int64], str]:
    """Indices [resamples, n] of draws with replacement: all n^n of them where that is few, else a fixed random sample."""
    if n**n <= MAX_EXACT_RESAMPLES:
        return np.array(list(product(range(n), repeat=n)), dtype=np.int64), f"all {n**n} resamples"
    return np.random.default_rng(0).integers(0, n, size=(RESAMPLES, n)), f"{RESAMPLES} resamples"
