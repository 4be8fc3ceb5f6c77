import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curricula.mixture import DomainMixture, check_quotas, largest_remainder
from posttrain.errors import SettingsError


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [
        ([0.5, 0.3, 0.2], 4, [2, 1, 1]),
        ([47_000, 16_000, 15_800, 12_000, 6_100, 3_100], 10, [5, 2, 1, 1, 1, 0]),
        ([1, 1, 1], 4, [2, 1, 1]),
        ([1, 0], 3, [3, 0]),
        ([0.1] * 10, 10, [1] * 10),
    ],
)
def test_largest_remainder(weights, total, expected):
    assert largest_remainder(weights, total) == expected


def test_largest_remainder_pays_what_is_owed():
    assert largest_remainder([1, 1, 1], 1, owed=[0, 0, 0]) == [1, 0, 0]
    assert largest_remainder([1, 1, 1], 1, owed=[-2 / 3, 1 / 3, 1 / 3]) == [0, 1, 0]


shares = st.lists(st.floats(0.001, 1), min_size=1, max_size=8)


@given(shares, st.integers(1, 40), st.integers(1, 30))
def test_every_batch_is_within_one_of_its_quotas_and_none_is_short_for_long(
    weights, batch_size, num_batches
):
    quotas = {f"d{i}": weight / sum(weights) * batch_size for i, weight in enumerate(weights)}
    mixture = DomainMixture(quotas, batch_size)
    total = Counter()
    for _ in range(num_batches):
        batch = Counter(mixture.next_batch())
        for name, quota in quotas.items():
            assert abs(batch[name] - quota) <= 1 + 1e-9
        total += batch
    for name, quota in quotas.items():
        assert abs(total[name] - num_batches * quota) < len(quotas)


def test_a_share_below_one_draw_a_batch_is_met_over_time():
    mixture = DomainMixture({"big": 0.95, "small": 0.05}, batch_size=4)
    drawn = Counter(domain for _ in range(100) for domain in mixture.next_batch())
    assert drawn == {"big": 380, "small": 20}


def test_domains_are_spread_over_the_batch():
    mixture = DomainMixture({"a": 0.5, "b": 0.5}, batch_size=8)
    assert mixture.next_batch() == ["a", "b"] * 4


def test_a_share_of_zero_is_never_drawn():
    mixture = DomainMixture({"a": 0.7, "b": 0.0, "c": 0.3}, batch_size=3)
    drawn = Counter(domain for _ in range(100) for domain in mixture.next_batch())
    assert drawn == {"a": 210, "c": 90}


def play(rates, quotas, num_batches, seed=0):
    """Draws by domain and trained groups by domain, for a chance of a signal in each: a seat is
    drawn for until a group carries one."""
    mixture = DomainMixture(quotas, batch_size=16)
    chance = random.Random(seed)
    drawn, trained = Counter(), Counter()
    for _ in range(num_batches):
        for seat in mixture.next_batch():
            domain, signal = seat, False
            while not signal:
                signal = chance.random() < rates[domain]
                mixture.observe(domain, trainable=signal)
                drawn[domain] += 1
                trained[domain] += signal
                domain = domain if signal else mixture.instead_of(domain)
    return drawn, trained


def test_quotas_are_kept_by_what_is_trained():
    rates, quotas = {"a": 0.9, "b": 0.45, "c": 0.3}, {"a": 0.5, "b": 0.25, "c": 0.25}
    drawn, trained = play(rates, quotas, 200)
    for name, quota in quotas.items():
        assert trained[name] / trained.total() == pytest.approx(quota, abs=0.015)
    assert drawn["c"] > drawn["b"] > 0


def test_a_domain_without_any_signal_costs_little_and_is_asked_again_and_again():
    drawn, trained = play({"a": 0.8, "hopeless": 0.0}, {"a": 0.5, "hopeless": 0.5}, 400)
    assert trained == {"a": 6400, "hopeless": 0}
    assert 0 < drawn["hopeless"] / drawn.total() < 0.25


def test_a_seat_stays_with_its_domain_until_the_patience_is_over():
    mixture = DomainMixture({"a": 1.0, "b": 1.0}, batch_size=2)
    for _ in range(15):
        mixture.observe("a", trainable=False)
    assert mixture.instead_of("a") == "a"
    mixture.observe("a", trainable=False)
    assert mixture.instead_of("a") == mixture.instead_of("b") == "b"
    for _ in range(16):
        mixture.observe("b", trainable=False)
    assert mixture.instead_of("a") == "a"  # nobody is left to pass it to
    mixture.observe("a", trainable=True)
    assert [mixture.instead_of(domain) for domain in "ab"] == ["a", "a"]


def test_a_domain_with_too_little_signal_gets_less_than_its_quota():
    mixture = DomainMixture({"a": 0.5, "b": 0.5}, batch_size=16)
    for number in range(400):
        mixture.observe("b", trainable=number % 10 == 0)
    share = mixture.shares()["b"]
    signal = mixture.state_dict()["mixture_trainable"][1]
    assert 0.05 < signal < 0.15
    assert share == pytest.approx(4 * signal / (1 + 4 * signal))


def test_fixed_quotas_are_kept_whatever_that_costs():
    mixture = DomainMixture({"a": 0.5, "b": 0.5}, batch_size=16, fixed=True)
    for _ in range(400):
        mixture.observe("a", trainable=True)
        mixture.observe("b", trainable=False)
    assert mixture.shares() == {"a": 0.5, "b": 0.5}
    assert Counter(mixture.next_batch()) == {"a": 8, "b": 8}
    assert mixture.instead_of("b") == "b"


def test_a_run_without_any_signal_goes_on_planning_by_quota():
    mixture = DomainMixture({"a": 0.25, "b": 0.75}, batch_size=16)
    for _ in range(1000):
        mixture.observe("a", trainable=False)
        mixture.observe("b", trainable=False)
    planned = Counter(domain for _ in range(100) for domain in mixture.next_batch())
    assert planned == {"a": 400, "b": 1200}


@given(shares, st.integers(1, 12), st.integers(0, 40))
def test_a_restored_mixture_goes_on_where_it_was(weights, batch_size, num_batches):
    quotas = {f"d{i}": weight for i, weight in enumerate(weights)}
    mixture, restored = DomainMixture(quotas, batch_size), DomainMixture(quotas, batch_size)
    for _ in range(num_batches):
        for number, domain in enumerate(mixture.next_batch()):
            mixture.observe(domain, trainable=number % 3 == 0)
    restored.load_state_dict(mixture.state_dict())
    assert [mixture.next_batch() for _ in range(9)] == [restored.next_batch() for _ in range(9)]
    assert [mixture.instead_of(d) for d in quotas] == [restored.instead_of(d) for d in quotas]


@pytest.mark.parametrize(
    ("quotas", "message"),
    [
        ({"a": 0.0, "b": 0.0}, "sum to nothing"),
        ({"a": 0.5, "b": 0.5, "c": 1.0}, "name domain 'c', which has no prompts; there are: a, b"),
        ({"a": 1.0}, "say nothing about b: add a share, 0 to leave a domain out"),
    ],
)
def test_quotas_that_do_not_fit(quotas, message):
    with pytest.raises(SettingsError, match=message):
        check_quotas(quotas, {"a": 3, "b": 4})
