"""Figures from counts: c of n answers to a prompt were correct, p is its true pass rate.

Everything that stops sampling early reads the posterior, which stopping does not bias;
`pass_at_k` and `wilson_interval` hold only for an n that was fixed before sampling.
"""

from __future__ import annotations

import math
from statistics import NormalDist

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


def beta_cdf(x: float, a: float, b: float) -> float:
    """P(p ≤ x) for p ~ Beta(a, b): the regularised incomplete beta function I_x(a, b).

    Continued fraction DLMF 8.17.22 by Lentz's method, good to about 1e-14 for the a, b ≤ 1e4
    that counts of samples reach.
    """
    if x <= 0.0:
        return 0.0
    if x >= 1.0:
        return 1.0
    log_front = (
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    # The fraction converges quickly only below the mean; above it, I_x(a, b) = 1 - I_{1-x}(b, a).
    if x <= (a + 1.0) / (a + b + 2.0):
        return math.exp(log_front) / a / _incomplete_beta_fraction(x, a, b)
    return 1.0 - math.exp(log_front) / b / _incomplete_beta_fraction(1.0 - x, b, a)


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
