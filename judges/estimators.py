"""Figures from counts: c of n answers to a prompt were correct, p is its true pass rate.

Everything that stops sampling early reads the posterior, which stopping does not bias;
`pass_at_k` and `wilson_interval` hold only for an n that was fixed before sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

JEFFREYS = (0.5, 0.5)


def check_counts(n: int, c: int) -> None:
    """Raises ValueError unless 0 ≤ c ≤ n."""
    if not 0 <= c <= n:
        raise ValueError(f"{c} correct of {n} samples: need 0 <= correct <= samples")


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k answers is correct (Chen et al. 2021).

    Unbiased only when n was fixed before sampling. Raises ValueError for k outside 1..n.
    """
    check_counts(n, c)
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} from {n} samples: need 1 <= k <= samples")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def posterior(n: int, c: int, prior: tuple[float, float] = JEFFREYS) -> tuple[float, float]:
    """Beta(a, b) of the pass rate after c of n; valid under early stopping."""
    check_counts(n, c)
    return prior[0] + c, prior[1] + n - c


def expected_pass_at_k(a: float, b: float, k: int) -> float:
    """E[1 − (1−p)^k] = 1 − B(a, b+k)/B(a, b) under Beta(a, b); the mean of p for k=1."""
    return 1.0 - math.prod((b + i) / (a + b + i) for i in range(k))


def no_signal_probability(p: float, group_size: int) -> float:
    """p^G + (1−p)^G: the chance that G answers are all correct or all wrong."""
    return float(p**group_size + (1.0 - p) ** group_size)


def expected_no_signal_probability(a: float, b: float, group_size: int) -> float:
    """E[p^G + (1−p)^G] under Beta(a, b)."""
    all_correct = math.prod((a + i) / (a + b + i) for i in range(group_size))
    all_wrong = math.prod((b + i) / (a + b + i) for i in range(group_size))
    return all_correct + all_wrong


def wilson_interval(n: int, c: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided interval for p (Wilson 1927), for an n fixed before sampling.

    Raises ValueError for n = 0 or a confidence outside (0, 1).
    """
    check_counts(n, c)
    if n == 0:
        raise ValueError("no samples, so no interval: leave the row out or sample it first")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
    z = NormalDist().inv_cdf(0.5 + confidence / 2.0)
    rate = c / n
    scale = 1.0 + z * z / n
    centre = (rate + z * z / (2 * n)) / scale
    half = z * math.sqrt(rate * (1.0 - rate) / n + z * z / (4 * n * n)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def credible_interval(a: float, b: float, confidence: float = 0.95) -> tuple[float, float]:
    """Equal-tailed interval for p ~ Beta(a, b); valid under early stopping.

    Raises ValueError for a confidence outside (0, 1).
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
    tail = (1.0 - confidence) / 2.0
    return beta_quantile(tail, a, b), beta_quantile(1.0 - tail, a, b)


def pass_at_k_interval(a: float, b: float, k: int, confidence: float = 0.95) -> tuple[float, float]:
    """Equal-tailed interval for 1 − (1−p)^k under p ~ Beta(a, b): it grows with p."""
    low, high = credible_interval(a, b, confidence)
    return 1.0 - (1.0 - low) ** k, 1.0 - (1.0 - high) ** k


def rate_at(value: float, k: int) -> float:
    """The pass rate p whose pass@k, 1 − (1−p)^k, is `value`."""
    return float(1.0 - (1.0 - value) ** (1.0 / k))


def predictive_interval(a: float, b: float, m: int, confidence: float = 0.95) -> tuple[int, int]:
    """Equal-tailed interval for the successes among m fresh answers when p ~ Beta(a, b):
    beta-binomial, P(j) = C(m, j)·B(a+j, b+m−j)/B(a, b). Both ends belong to it.
    """
    tail = (1.0 - confidence) / 2.0
    below = 0.0
    low: int | None = None
    for j in range(m + 1):
        below += math.exp(
            math.lgamma(m + 1) - math.lgamma(j + 1) - math.lgamma(m - j + 1)
            + _log_beta(a + j, b + m - j) - _log_beta(a, b)
        )  # fmt: skip
        if low is None and below > tail:
            low = j
        if below >= 1.0 - tail:
            assert low is not None
            return low, j
    assert low is not None  # rounding may leave the sum a hair below 1
    return low, m


def by_counts(
    n: NDArray[np.integer], c: NDArray[np.integer], figure: Callable[[int, int], float]
) -> NDArray[np.float64]:
    """`figure(n, c)` for every element of two arrays `[N]`, computed once for each pair of counts
    that occurs: a million prompts have a few hundred."""
    base = int(n.max(initial=0)) + 1
    codes, places = distinct(n.astype(np.int64) * base + c)
    values = np.array([figure(*divmod(int(code), base)) for code in codes], dtype=np.float64)
    return values[places]


def distinct(codes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    """The different ones of N codes in order, and for each element which one it is: as
    `np.unique`, in a third of its memory where few are different."""
    found = np.unique(codes)
    return found, np.searchsorted(found, codes)


def beta_quantile(q: float, a: float, b: float) -> float:
    """The x with P(p ≤ x) = q for p ~ Beta(a, b), by bisection to 1e-12."""
    low, high = 0.0, 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2.0
        if beta_cdf(middle, a, b) < q:
            low = middle
        else:
            high = middle
    return (low + high) / 2.0


def beta_cdf(x: float, a: float, b: float) -> float:
    """P(p ≤ x) for p ~ Beta(a, b): the regularised incomplete beta function I_x(a, b).

    Continued fraction DLMF 8.17.22 by Lentz's method, good to about 1e-14 for the a, b ≤ 1e4
    that counts of samples reach.
    """
    if x <= 0.0:
        return 0.0
    if x >= 1.0:
        return 1.0
    log_front = a * math.log(x) + b * math.log1p(-x) - _log_beta(a, b)
    # The fraction converges quickly only below the mean; above it, I_x(a, b) = 1 - I_{1-x}(b, a).
    if x <= (a + 1.0) / (a + b + 2.0):
        return math.exp(log_front) / a / _incomplete_beta_fraction(x, a, b)
    return 1.0 - math.exp(log_front) / b / _incomplete_beta_fraction(1.0 - x, b, a)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _incomplete_beta_fraction(x: float, a: float, b: float) -> float:
    """1 + d₁/(1 + d₂/(1 + …)) with the coefficients of DLMF 8.17.22."""
    tiny = 1e-300
    value, upper, lower = 1.0, 1.0, 0.0
    for step in range(1, 1000):
        m, odd = divmod(step, 2)
        if odd:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        lower = 1.0 / ((1.0 + d * lower) or tiny)
        upper = (1.0 + d / upper) or tiny
        change = upper * lower
        value *= change
        if abs(change - 1.0) < 1e-15:
            return value
    raise ArithmeticError(f"incomplete beta function did not converge at x={x}, a={a}, b={b}")
