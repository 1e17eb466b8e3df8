"""Every formula against an answer found another way: enumeration, scipy, simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from bridgelm.analysis import stats


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 1), (6, 3), (8, 8)])
def test_pass_at_k_equals_enumeration_of_all_draws(n, k):
    for correct in range(n + 1):
        samples = [1] * correct + [0] * (n - correct)
        draws = [any(draw) for draw in itertools.combinations(samples, k)]
        assert stats.pass_at_k(n, correct, k) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


def test_pass_at_k_is_unbiased_for_a_model_that_is_right_with_chance_p():
    n, k, p = 10, 4, 0.23
    expected = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * stats.pass_at_k(n, c, k) for c in range(n + 1))
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_pass_at_k_survives_counts_whose_binomials_overflow():
    assert 0.6 < stats.pass_at_k(100_000, 10, 10_000) < 0.7


@pytest.mark.parametrize("args", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_impossible_counts(args):
    with pytest.raises(ValueError, match="pass@k"):
        stats.pass_at_k(*args)


@pytest.mark.parametrize("n", [1, 7, 50, 1000])
def test_wilson_equals_scipy(n):
    for correct in {0, 1, n // 2, n}:
        expected = scipy.stats.binomtest(correct, n).proportion_ci(method="wilson")
        assert stats.wilson(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_covers_the_truth_about_as_often_as_it_says():
    n, p = 60, 0.15
    chance = scipy.stats.binom.pmf(np.arange(n + 1), n, p)
    inside = [low <= p <= high for low, high in (stats.wilson(c, n) for c in range(n + 1))]
    assert 0.93 < float(chance[inside].sum()) < 0.97


@given(st.floats(-60, 60), st.sampled_from([1, 2, 3, 4, 9, 30, 200]))
def test_t_distribution_equals_scipy(t, df):
    assert stats.t_cdf(t, df) == pytest.approx(scipy.stats.t.cdf(t, df), rel=1e-8, abs=1e-13)


@given(st.floats(-1e4, 1e4))
def test_t_distribution_equals_its_closed_forms(t):
    """Sharper than scipy, which is off by 1e-9 near 0."""
    assert stats.t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-14)
    assert stats.t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-14)


@pytest.mark.parametrize("df", [1, 2, 4, 29])
@pytest.mark.parametrize("p", [0.025, 0.5, 0.8, 0.975, 0.9995])
def test_t_quantile_equals_scipy(p, df):
    assert stats.t_quantile(p, df) == pytest.approx(scipy.stats.t.ppf(p, df), rel=1e-9)


def test_mean_interval_equals_scipy_and_has_no_spread_for_one_value():
    values = [0.71, 0.74, 0.69, 0.80, 0.77]
    found = stats.mean_interval(values)
    low, high = scipy.stats.t.interval(0.95, 4, np.mean(values), scipy.stats.sem(values))
    assert found is not None
    assert (found.value, found.low, found.high, found.n) == pytest.approx((np.mean(values), low, high, 5))
    assert stats.mean_interval([0.5]) == stats.Estimate(0.5, None, None, 1)
    assert stats.mean_interval([]) is None


def test_paired_difference_pairs_by_seed_and_equals_scipy():
    first = {3: 0.80, 0: 0.61, 1: 0.75, 2: 0.70, 9: 0.1}
    second = {0: 0.58, 1: 0.73, 2: 0.69, 3: 0.74, 8: 0.9}
    found = stats.paired_difference(first, second)
    expected = scipy.stats.ttest_rel([first[i] for i in range(4)], [second[i] for i in range(4)])
    interval = expected.confidence_interval()
    assert found is not None and found.n == 4
    assert (found.p, found.low, found.high) == pytest.approx((expected.pvalue, interval.low, interval.high))
    assert stats.paired_difference({0: 1.0}, {1: 1.0}) is None
    single = stats.paired_difference({0: 0.6}, {0: 0.5})
    assert single is not None and single.p is None and single.low is None


def test_differences_without_spread():
    same = stats.paired_difference({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6})
    shifted = stats.paired_difference({0: 0.5, 1: 0.6}, {0: 0.4, 1: 0.5})
    assert same is not None and same.p == 1.0
    assert shifted is not None and shifted.p == 0.0


def test_equivalence_equals_two_one_sided_tests_of_scipy():
    gaps = [0.004, -0.006, 0.001, 0.003, -0.002]
    for margin in (0.002, 0.01, 0.05):
        above = scipy.stats.ttest_1samp(gaps, -margin, alternative="greater").pvalue
        below = scipy.stats.ttest_1samp(gaps, margin, alternative="less").pvalue
        assert stats.equivalence(gaps, margin) == pytest.approx(max(above, below))
    assert stats.equivalence([0.0, 0.0, 0.0], 0.02) == 0.0
    assert stats.equivalence([0.1, 0.1, 0.1], 0.02) == 1.0
    assert stats.equivalence([0.1], 0.02) is None


def _items(wins: int, losses: int, ties: int) -> tuple[dict[str, int], dict[str, int]]:
    pairs = [(1, 0)] * wins + [(0, 1)] * losses + [(1, 1)] * ties
    return {str(i): a for i, (a, _) in enumerate(pairs)}, {str(i): b for i, (_, b) in enumerate(pairs)}


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (8, 1), (5, 5), (3, 12)])
def test_mcnemar_equals_the_exact_binomial_test_and_ignores_ties(wins, losses):
    expected = scipy.stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert stats.mcnemar(*_items(wins, losses, 20)) == pytest.approx(expected)


def test_paired_bootstrap_agrees_with_the_normal_interval_on_many_items():
    first, second = _items(60, 30, 210)
    found = stats.paired_bootstrap(first, second)
    assert found is not None and found.unit == "problems" and found.n == 300
    gaps = np.array([first[i] - second[i] for i in first])
    half = 1.96 * gaps.std() / math.sqrt(len(gaps))
    assert found.value == pytest.approx(0.1)
    assert found.low == pytest.approx(0.1 - half, abs=0.006)
    assert found.high == pytest.approx(0.1 + half, abs=0.006)
    assert stats.paired_bootstrap({"a": 1}, {"b": 1}) is None


def test_paired_t_interval_covers_the_truth_in_simulation():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        seed_effect = rng.normal(0, 0.1, 5)
        first = dict(enumerate(seed_effect + rng.normal(0.02, 0.02, 5)))
        found = stats.paired_difference(first, dict(enumerate(seed_effect)))
        assert found is not None and found.low is not None and found.high is not None
        hits += found.low <= 0.02 <= found.high
    assert 0.935 < hits / 2000 < 0.965  # and the shared seed effect of .1 has dropped out


def test_holm_by_hand():
    assert stats.holm([0.04, 0.01, None, 0.03]) == pytest.approx([0.06, 0.03, None, 0.06])
    assert stats.holm([0.6, 0.7]) == [1.0, 1.0]


def test_at_budget_takes_the_last_evaluation_at_or_below():
    xs, ys = [0, 100, 200, 300], [0.1, 0.2, 0.4, 0.3]
    assert stats.at_budget(xs, ys, 200) == 0.4
    assert stats.at_budget(xs, ys, 299.9) == 0.4  # not interpolated, not the later one
    assert stats.at_budget(xs, ys, 1e9) == 0.3  # the last, not the best
    assert stats.at_budget(xs, ys, -1) is None
    assert stats.at_budget([0, 0, 0], [0.1, 0.2, 0.3], 0) == 0.3  # a method without rollouts: its last evaluation


def test_mean_height_against_a_fine_sum():
    xs, ys = [0.0, 1.0, 4.0, 10.0], [0.0, 0.5, 0.6, 0.9]
    for until in (None, 2.5, 10.0, 50.0):
        grid = np.linspace(0, min(until or 10.0, 10.0), 200_001)
        assert stats.mean_height(xs, ys, until) == pytest.approx(float(np.interp(grid, xs, ys).mean()), abs=1e-5)
    assert stats.mean_height([1.0], [0.5]) is None
