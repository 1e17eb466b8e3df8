"""Estimates, confidence intervals and paired tests, which are behind every number in a report. Only numpy and math; no
scipy.

Two kinds of spread occur and must not be mixed up: over seeds (the recipe trained again: Student's t over the seeds'
means) and over test problems (the same model asked other questions: Wilson, McNemar, bootstrap). Comparisons of
methods use seeds, paired by seed, wherever there are at least two of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its interval. `low` and `high` are None where one value gives no spread."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int = 1


@dataclass(frozen=True, slots=True)
class Difference:
    """First minus second, paired. `unit` says over what the spread was taken; `p` is two-sided, None if undefined."""

    value: float
    low: float | None
    high: float | None
    p: float | None
    n: int
    unit: str = "seeds"


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold a correct one: 1 - C(n - c, k) / C(n, k).

    The product form, as the binomials overflow; unbiased for pass@k of the model (Chen et al. 2021).
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= correct <= n and 1 <= k <= n, got n={n}, correct={correct}, k={k}")
    if n - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - correct + 1, n + 1))


def wilson(correct: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a proportion; stays within [0, 1] and works at 0 and n."""
    if n < 1:
        return 0.0, 1.0
    z2 = NormalDist().inv_cdf(0.5 + level / 2) ** 2
    share = correct / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Iterable[float], level: float = LEVEL) -> Estimate | None:
    """Mean over seeds with Student's t interval; None for no values."""
    found = [float(value) for value in values]
    if not found:
        return None
    mean = math.fsum(found) / len(found)
    if len(found) < 2:
        return Estimate(mean)
    half = t_quantile(0.5 + level / 2, len(found) - 1) * _deviation(found, mean) / math.sqrt(len(found))
    return Estimate(mean, mean - half, mean + half, len(found))


def paired_difference(first: Mapping[int, float], second: Mapping[int, float],
                      level: float = LEVEL) -> Difference | None:
    """First minus second over the seeds that both have: paired t interval, two-sided p. None without a common seed."""
    gaps = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    estimate = mean_interval(gaps, level)
    if estimate is None:
        return None
    return Difference(estimate.value, estimate.low, estimate.high, _t_test(gaps, 0.0, two_sided=True), len(gaps))


def equivalence(gaps: Sequence[float], margin: float) -> float | None:
    """p of two one-sided t tests (TOST): small means that the true mean gap lies within +-margin."""
    if len(gaps) < 2:
        return None
    above = _t_test(gaps, -margin, two_sided=False)
    below = _t_test([-gap for gap in gaps], -margin, two_sided=False)
    return max(above or 0.0, below or 0.0)


def mcnemar(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """Exact two-sided McNemar test of two models on the same problems: are the disagreements a fair coin?"""
    common = first.keys() & second.keys()
    wins = sum(first[item] > second[item] for item in common)
    losses = sum(first[item] < second[item] for item in common)
    tail = sum(math.comb(wins + losses, i) for i in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2 ** (wins + losses))


def paired_bootstrap(first: Mapping[str, float], second: Mapping[str, float], draws: int = 2000, seed: int = 0,
                     level: float = LEVEL) -> Difference | None:
    """First minus second over the same problems: percentile interval of resampled problems, p from `mcnemar`."""
    common = sorted(first.keys() & second.keys())
    if not common:
        return None
    gaps = np.array([first[item] - second[item] for item in common], dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = np.array([gaps[rng.integers(0, len(gaps), len(gaps))].mean() for _ in range(draws)])
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    return Difference(float(gaps.mean()), float(low), float(high), mcnemar(first, second), len(common), "problems")


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's adjustment of several p-values: keeps the chance of any false claim among them at the level."""
    order = sorted((i for i, p in enumerate(ps) if p is not None), key=lambda i: ps[i] or 0.0)
    adjusted: list[float | None] = [None] * len(ps)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * (ps[i] or 0.0)))
        adjusted[i] = highest
    return adjusted


def at_budget(xs: Sequence[float], ys: Sequence[float], budget: float) -> float | None:
    """The curve's value at a budget: its last evaluation at or below it. Never a later one, never interpolated."""
    seen = [(x, i) for i, x in enumerate(xs) if x <= budget * (1 + 1e-12)]
    return ys[max(seen)[1]] if seen else None


def mean_height(xs: Sequence[float], ys: Sequence[float], until: float | None = None) -> float | None:
    """Area under the curve (trapezoids) from its first point to `until`, divided by that width."""
    points = sorted(zip(xs, ys, strict=True))
    if until is not None and points and points[-1][0] > until:
        end = float(np.interp(until, [x for x, _ in points], [y for _, y in points]))
        points = [point for point in points if point[0] < until] + [(until, end)]
    if len(points) < 2 or points[-1][0] <= points[0][0]:
        return None
    area = math.fsum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))
    return area / (points[-1][0] - points[0][0])


def _deviation(values: Sequence[float], mean: float) -> float:
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _t_test(values: Sequence[float], null: float, two_sided: bool) -> float | None:
    """p of the mean being `null`; one-sided: against it being larger. Values without spread decide by themselves."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    error = _deviation(values, mean) / math.sqrt(len(values))
    if error <= 1e-12 * max(1.0, abs(mean)):  # rounding only
        certain = math.isclose(mean, null, abs_tol=1e-12)
        return (1.0 if certain else 0.0) if two_sided else float(mean <= null or certain)
    t = (mean - null) / error
    return 2 * t_cdf(-abs(t), len(values) - 1) if two_sided else t_cdf(-t, len(values) - 1)


def t_cdf(t: float, df: float) -> float:
    """Student's t distribution function, through the regularised incomplete beta function."""
    if t * t < df:  # the small one of x and 1 - x goes in: near t = 0 the other is rounded to 1
        tail = 0.5 * (1 - _incomplete_beta(0.5, df / 2, t * t / (df + t * t)))
    else:
        tail = 0.5 * _incomplete_beta(df / 2, 0.5, df / (df + t * t))
    return tail if t < 0 else 1 - tail


def t_quantile(p: float, df: float) -> float:
    """The t with t_cdf(t, df) = p."""
    if p == 0.5:
        return 0.0
    if p < 0.5:
        return -t_quantile(1 - p, df)
    high = 1.0
    while t_cdf(high, df) < p:
        high *= 2
    return _bisect(lambda t: t_cdf(t, df) - p, 0.0, high)


def _bisect(function: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b) by its continued fraction (Lentz), on the side where that converges fast."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    result = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / (1 + term * d)
            c = 1 + term / c
            result *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return front * result
