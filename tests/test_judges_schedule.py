from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from judges.labels import LabelSettings
from judges.schedule import Ask, Schedule
from judges.selection import SelectionSettings
from judges.stopping import CutRule, FixedN, LabelRule


def schedule(
    num, rule, *, scored=None, correct=None, domain=None, round_size=4, cap=16, may_ask=None
):
    none = np.zeros(num, dtype=int)
    scored = none if scored is None else np.array(scored)
    return Schedule(
        scored,
        scored,
        none if correct is None else np.array(correct),
        none if domain is None else np.array(domain),
        rule,
        round_size=round_size,
        cap=cap,
        may_ask=None if may_ask is None else np.array(may_ask),
    )


def drain(plan: Schedule, rates, concurrency=1, rng=None):
    """Answers every request, the oldest first; returns the requests in their order."""
    in_flight, asks = [], []
    rng = rng or np.random.default_rng(0)
    while True:
        while len(in_flight) < concurrency and (ask := plan.next()) is not None:
            assert ask.index not in {a.index for a in in_flight}
            in_flight.append(ask)
        if not in_flight:
            return asks
        ask = in_flight.pop(0)
        asks.append(ask)
        correct = int(rng.binomial(ask.size, rates[ask.index]))
        plan.record(ask.index, asked=ask.size, scored=ask.size, correct=correct)


def test_fixed_n_asks_everyone_once_in_order():
    asks = drain(schedule(3, FixedN(), round_size=None, cap=7), [1.0, 0.5, 0.0])
    assert asks == [Ask(0, 7, 0), Ask(1, 7, 0), Ask(2, 7, 0)]


def test_a_prompt_once_begun_is_decided_before_the_next():
    plan = schedule(2, LabelRule(LabelSettings()))
    asks = drain(plan, [1.0, 0.0])
    assert [(a.index, a.asked) for a in asks] == [(i, s) for i in (0, 1) for s in (0, 4, 8, 12)]
    assert list(plan.scored) == [16, 16]


def test_what_was_sampled_before_counts():
    plan = schedule(4, FixedN(), scored=[16, 5, 0, 16], correct=[3, 2, 0, 0])
    asks = drain(plan, [0.0] * 4)
    assert Counter(a.index for a in asks) == {1: 3, 2: 4}
    assert next(a for a in asks if a.index == 1) == Ask(1, 4, 5)
    assert list(plan.scored) == [16, 16, 16, 16]
    assert list(plan.correct) == [3, 2, 0, 0]


def test_unscored_answers_are_asked_for_again_and_counted_apart():
    plan = schedule(1, FixedN(), cap=4)
    assert plan.next() == Ask(0, 4, 0)
    plan.record(0, asked=4, scored=1, correct=1)
    assert plan.next() == Ask(0, 3, 4)
    assert plan.next() is None
    plan.record(0, asked=3, scored=3, correct=0)
    assert plan.next() is None
    assert (plan.asked[0], plan.scored[0], plan.correct[0]) == (7, 4, 1)


def test_a_quantile_spends_on_what_straddles_the_cut():
    rates = np.array([0.0, 1.0, 0.5, 0.0, 1.0] * 20)
    plan = schedule(100, CutRule(SelectionSettings(drop_easiest=0.5), 0.9), cap=32)
    asks = drain(plan, rates, concurrency=16)
    assert [a.index for a in asks[:100]] == list(range(100))
    assert set(plan.scored[rates == 0.0]) == {4}
    assert set(plan.scored[rates == 1.0]) <= {4, 8}
    # The cut lies among those at .5, which are asked on and on.
    assert plan.scored[rates == 0.5].mean() > 16


def test_ties_at_their_domains_cut_go_to_the_cap():
    domains = [0] * 10 + [1] * 10
    rule = CutRule(SelectionSettings(drop_easiest=0.5, by_domain=True), 0.9)
    plan = schedule(20, rule, domain=domains, cap=8)
    drain(plan, [1.0] * 10 + [0.0] * 10, concurrency=4)
    # Equal prompts are ties on their domain's cut: nothing but the cap can decide.
    assert set(plan.scored) == {8}


def test_who_may_not_be_asked_counts_for_the_rule_only():
    class Counting(FixedN):
        def follow(self, population):
            self.seen = sum(population.values())

    rule = Counting()
    plan = schedule(
        5, rule, scored=[0, 0, 4, 4, 0], cap=8, may_ask=[True, False, True, False, False]
    )
    assert (rule.seen, plan.num_open()) == (5, 2)
    assert Counter(a.index for a in drain(plan, [0.0] * 5)) == {0: 2, 2: 1}
    assert list(plan.scored) == [8, 0, 8, 4, 0]
    assert rule.seen == 5


def test_num_open_counts_what_is_left_and_not_what_is_under_way():
    plan = schedule(4, LabelRule(LabelSettings()), scored=[13, 4, 0, 16], correct=[13, 4, 0, 0])
    assert plan.num_open() == 2
    assert plan.next() == Ask(1, 4, 4)
    assert plan.num_open() == 1


rules = st.sampled_from(
    [
        FixedN,
        lambda: LabelRule(LabelSettings()),
        lambda: CutRule(SelectionSettings(drop_easiest=0.5), 0.9),
        lambda: CutRule(SelectionSettings(drop_easiest=0.95, by_domain=True), 0.8),
        lambda: CutRule(SelectionSettings(easy_above=0.7, metric="pass@k", k=4), 0.95),
    ]
)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 2)), max_size=40),
    rules,
    st.integers(1, 7),
    st.integers(1, 20),
    st.integers(1, 9),
)
def test_every_rule_ends_with_everyone_sampled_and_nobody_beyond_the_cap(
    prompts, make_rule, round_size, cap, concurrency
):
    rule = make_rule()
    rates = [rate for rate, _ in prompts]
    plan = schedule(
        len(prompts), rule, domain=[d for _, d in prompts], round_size=round_size, cap=cap
    )
    asks = drain(plan, rates, concurrency)
    asked = Counter()
    for ask in asks:
        assert 1 <= ask.size <= round_size
        assert ask.asked == asked[ask.index]
        asked[ask.index] += ask.size
    assert [asked[i] for i in range(len(prompts))] == list(plan.scored)
    assert all(0 < n <= cap for n in plan.scored)
    assert plan.next() is None
    assert plan.num_open() == 0


def test_a_million_prompts_take_little_memory_and_no_pass_over_all_for_the_next():
    num = 1_000_000
    plan = schedule(num, CutRule(SelectionSettings(drop_easiest=0.5), 0.9))
    for _ in range(2000):
        ask = plan.next()
        plan.record(ask.index, asked=4, scored=4, correct=ask.index % 5)
    held = sum(a.nbytes for a in (plan.asked, plan.scored, plan.correct))
    assert held == 12 * num
    assert plan.num_open() == pytest.approx(num - 2000, abs=2000)
