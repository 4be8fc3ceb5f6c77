import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from judges.estimators import (
    beta_cdf,
    beta_quantile,
    by_counts,
    credible_interval,
    distinct,
    expected_no_signal_probability,
    expected_pass_at_k,
    no_signal_probability,
    pass_at_k,
    pass_at_k_interval,
    posterior,
    predictive_interval,
    rate_at,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [(10, 3, 5, 0.916667), (200, 5, 100, 0.970308), (16, 1, 8, 0.5), (5, 2, 2, 0.7)],
)
def test_pass_at_k_golden(n, c, k, expected):
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=5e-7)


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), *[st.integers(0, n)] * 2)))
def test_pass_at_k_counts_the_subsets_that_hold_a_correct_answer(numbers):
    n, c, k = numbers
    k = max(k, 1)
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 0, 8), (4, 2, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_what_it_cannot_estimate(n, c, k):
    with pytest.raises(ValueError, match="need"):
        pass_at_k(n, c, k)


def test_posterior_is_jeffreys_plus_counts():
    assert posterior(10, 3) == (3.5, 7.5)
    assert posterior(0, 0) == (0.5, 0.5)
    assert posterior(4, 1, prior=(1.0, 2.0)) == (2.0, 5.0)


def test_expected_pass_at_k():
    assert expected_pass_at_k(*posterior(10, 3), 5) == pytest.approx(0.797066, abs=5e-7)
    assert expected_pass_at_k(3.5, 7.5, 1) == pytest.approx(3.5 / 11)


def test_no_signal_probability():
    assert [round(no_signal_probability(0.05, g), 3) for g in (4, 8, 16)] == [0.815, 0.663, 0.440]
    assert no_signal_probability(1.0, 8) == 1.0


def test_expected_no_signal_probability():
    # Uniform p: E[p^G] = E[(1-p)^G] = 1/(G+1).
    assert expected_no_signal_probability(1.0, 1.0, 8) == pytest.approx(2 / 9)
    # Jeffreys, G = 2: E[p²] = .5·1.5/(1·2) = .375, twice.
    assert expected_no_signal_probability(0.5, 0.5, 2) == pytest.approx(0.75)
    concentrated = expected_no_signal_probability(5_000.0, 95_000.0, 8)
    assert concentrated == pytest.approx(no_signal_probability(0.05, 8), abs=1e-3)


def test_wilson_interval():
    # 3 of 10 at 95%: the textbook's .1078 to .6032.
    assert wilson_interval(10, 3) == pytest.approx((0.107791, 0.603222), abs=1e-6)
    low, high = wilson_interval(10, 0)
    assert low == pytest.approx(0.0, abs=1e-15)
    z2 = 1.959963984540054**2
    assert high == pytest.approx(z2 / (10 + z2))
    with pytest.raises(ValueError, match="no samples"):
        wilson_interval(0, 0)
    with pytest.raises(ValueError, match=r"confidence 95"):
        wilson_interval(10, 3, 95)


@given(st.integers(1, 40), st.integers(1, 40), st.fractions(0, 1, max_denominator=50))
def test_beta_cdf_of_whole_counts_is_a_binomial_tail(a, b, x):
    # I_x(a, b) = P(at least a successes in a+b-1 trials of chance x), exact in fractions.
    n = a + b - 1
    tail = sum(
        (math.comb(n, j) * x**j * (1 - x) ** (n - j) for j in range(a, n + 1)), start=Fraction(0)
    )
    assert beta_cdf(float(x), a, b) == pytest.approx(float(tail), abs=1e-12)


@pytest.mark.parametrize(
    ("x", "a", "b", "expected"),
    [  # from mpmath.betainc(a, b, 0, x, regularized=True)
        (0.9, 13.5, 0.5, 0.094676101),
        (0.25, 0.5, 4.5, 0.882693197),
        (0.01, 0.5, 16.5, 0.4323786679),
        (0.5, 0.5, 0.5, 0.5),
    ],
)
def test_beta_cdf_of_half_counts(x, a, b, expected):
    assert beta_cdf(x, a, b) == pytest.approx(expected, rel=1e-9)


def test_beta_cdf_far_out():
    assert beta_cdf(0.5, 5_000.5, 5_000.5) == pytest.approx(0.5, abs=1e-10)
    assert beta_cdf(0.0, 2, 3) == 0.0
    assert beta_cdf(1.0, 2, 3) == 1.0


@given(st.floats(0.5, 40), st.floats(0.5, 40), st.floats(0.001, 0.999))
def test_a_quantile_is_where_the_distribution_reaches_it(a, b, q):
    assert beta_cdf(beta_quantile(q, a, b), a, b) == pytest.approx(q, abs=1e-6)


def test_credible_interval():
    # Uniform: the quantiles are the probabilities. Beta(2, 1) has the density 2p.
    assert credible_interval(1.0, 1.0, 0.9) == pytest.approx((0.05, 0.95))
    assert credible_interval(2.0, 1.0) == pytest.approx((math.sqrt(0.025), math.sqrt(0.975)))
    with pytest.raises(ValueError, match=r"confidence 1\.0 "):
        credible_interval(1.0, 1.0, 1.0)


def test_pass_at_k_interval_is_that_of_p_seen_through_k():
    low, high = pass_at_k_interval(1.0, 1.0, 2, 0.9)
    assert (low, high) == pytest.approx((1 - 0.95**2, 1 - 0.05**2))
    assert rate_at(low, 2) == pytest.approx(0.05)
    assert rate_at(0.9, 1) == pytest.approx(0.9)


def test_predictive_interval():
    # With a uniform p every count from 0 to m has probability 1/(m+1).
    assert predictive_interval(1.0, 1.0, 98, 0.9) == (4, 94)
    # p is all but known to be 1/2: the binomial's own quantiles, 16 ± 2.2·2.83.
    assert predictive_interval(5e5, 5e5, 32) == (10, 22)
    assert predictive_interval(*posterior(16, 16), 64)[1] == 64
    assert predictive_interval(*posterior(16, 0), 64)[0] == 0


@given(st.floats(0.5, 30), st.floats(0.5, 30), st.integers(1, 64))
def test_predictive_interval_holds_what_it_promises(a, b, m):
    def probability(j):
        return math.comb(m, j) * math.exp(log_beta(a + j, b + m - j) - log_beta(a, b))

    def log_beta(x, y):
        return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

    low, high = predictive_interval(a, b, m)
    assert sum(map(probability, range(low, high + 1))) >= 0.95 - 1e-9
    assert sum(map(probability, range(low))) <= 0.025 + 1e-9
    assert sum(map(probability, range(high + 1, m + 1))) <= 0.025 + 1e-9


@given(st.lists(st.integers(0, 9)))
def test_distinct_is_unique_with_its_inverse(numbers):
    codes = np.array(numbers, dtype=np.int64)
    for ours, numpys in zip(distinct(codes), np.unique(codes, return_inverse=True), strict=True):
        assert ours.tolist() == numpys.tolist()


def test_by_counts_asks_once_for_each_pair():
    asked = []

    def figure(n, c):
        asked.append((n, c))
        return c / n

    n, c = np.array([4, 8, 4, 16, 8]), np.array([1, 8, 1, 0, 2])
    assert list(by_counts(n, c, figure)) == [0.25, 1.0, 0.25, 0.0, 0.25]
    assert sorted(asked) == [(4, 1), (8, 2), (8, 8), (16, 0)]
    assert len(by_counts(n[:0], c[:0], figure)) == 0
