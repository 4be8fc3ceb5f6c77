import numpy as np
import pytest

from judges.passrates import PassRate, pass_rate, pass_rates


def counts(*pairs):
    n, c = zip(*pairs, strict=True)
    return np.array(n), np.array(c)


def test_unbiased_for_a_fixed_n_and_expected_otherwise():
    n, c = counts((4, 4), (4, 2), (4, 0))
    fixed = pass_rate(n, c, 1, fixed_n=True)
    assert fixed.mean == pytest.approx(0.5)
    # The standard deviation of 1, ½, 0 is ½; 1.96 · ½ / √3 = .566.
    assert (fixed.low, fixed.high) == (0.0, 1.0)
    # pass@2: 1, 1 − (2·1)/(4·3) = 5/6, 0.
    assert pass_rate(n, c, 2, fixed_n=True).mean == pytest.approx((1 + 5 / 6) / 3)
    # (4.5 + 2.5 + .5) / 5 / 3
    assert pass_rate(n, c, 1, fixed_n=False).mean == pytest.approx(0.5)
    # 1 − b(b+1)/((a+b)(a+b+1)): .5·1.5/30, 2.5·3.5/30, 4.5·5.5/30.
    expected = 1 - (0.75 + 8.75 + 24.75) / 30 / 3
    assert pass_rate(n, c, 2, fixed_n=False).mean == pytest.approx(expected)


def test_the_interval_narrows_with_prompts_and_is_absent_for_one():
    n, c = np.full(100, 10), np.tile([4, 6], 50)
    rate = pass_rate(n, c, 1, fixed_n=True)
    spread = 0.1 * np.sqrt(100 / 99)
    assert rate.high - rate.mean == pytest.approx(1.959964 * spread / 10)
    assert rate.low == pytest.approx(2 * rate.mean - rate.high)
    one = pass_rate(*counts((8, 0)), 1, fixed_n=True)
    assert one == PassRate(k=1, num_prompts=1, mean=0.0, low=None, high=None)


def test_by_domain():
    n, c = counts((4, 4), (4, 0), (4, 2), (4, 2))
    rates = pass_rates(n, c, np.array([0, 0, 2, 2]), ["a", "empty", "b"], 1, fixed_n=True)
    assert {name: r.num_prompts for name, r in rates.items()} == {"a": 2, "b": 2}
    assert [rates[name].mean for name in ("a", "b")] == pytest.approx([0.5, 0.5])
    assert rates["b"].low == rates["b"].high == rates["b"].mean


def test_what_cannot_be_estimated_is_an_error():
    n, c = counts((4, 2))
    with pytest.raises(ValueError, match="pass@8 from 4 samples"):
        pass_rate(n, c, 8, fixed_n=True)
    with pytest.raises(ValueError, match="no prompt was judged"):
        pass_rate(n[:0], c[:0], 1, fixed_n=False)


def test_the_interval_covers_the_populations_mean():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        p = rng.beta(0.5, 0.5, 60)  # a population whose mean is ½, as the prior expects
        n = np.full(60, 8)
        rate = pass_rate(n, rng.binomial(8, p), 1, fixed_n=False)
        hits += rate.low <= 0.5 <= rate.high
    assert hits >= 180
