"""pass@k of a set of judged prompts with its interval: the whole, and each domain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from judges.estimators import by_counts, expected_pass_at_k, pass_at_k, posterior


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRate:
    """Mean pass@k over `num_prompts` with its interval. `low` and `high` are None for a single
    prompt: the spread between prompts is what the interval is made of."""

    k: int
    num_prompts: int
    mean: float
    low: float | None
    high: float | None


def pass_rate(
    n: NDArray[np.integer],
    c: NDArray[np.integer],
    k: int,
    *,
    fixed_n: bool,
    confidence: float = 0.95,
) -> PassRate:
    """pass@k over prompts of which `c` of `n` answers (both `[N]`) were correct.

    With `fixed_n` the unbiased estimate (Chen et al. 2021), for an n that was fixed before
    sampling; else the posterior's expectation, which early stopping leaves valid but which few
    samples draw towards ½. The interval is normal over prompts: their spread holds both how they
    differ and how few samples each had. Raises ValueError without prompts, or for k > n if fixed.
    """
    if not len(n):
        raise ValueError("no prompt was judged, so there is no pass rate")
    figure = pass_at_k if fixed_n else _expected
    values = by_counts(n, c, lambda samples, correct: figure(samples, correct, k))
    mean = float(values.mean())
    if len(values) == 1:
        return PassRate(k=k, num_prompts=1, mean=mean, low=None, high=None)
    z = NormalDist().inv_cdf(0.5 + confidence / 2.0)
    half = z * float(values.std(ddof=1)) / math.sqrt(len(values))
    return PassRate(
        k=k,
        num_prompts=len(values),
        mean=mean,
        low=max(0.0, mean - half),
        high=min(1.0, mean + half),
    )


def pass_rates(
    n: NDArray[np.integer],
    c: NDArray[np.integer],
    domain: NDArray[np.integer],
    names: Sequence[str],
    k: int,
    *,
    fixed_n: bool,
) -> dict[str, PassRate]:
    """`pass_rate` of each domain that has prompts; `names[code]` is what a code in `domain` `[N]`
    stands for."""
    return {
        name: pass_rate(n[mask], c[mask], k, fixed_n=fixed_n)
        for code, name in enumerate(names)
        if (mask := domain == code).any()
    }


def _expected(n: int, c: int, k: int) -> float:
    return expected_pass_at_k(*posterior(n, c), k)
