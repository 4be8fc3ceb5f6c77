import random
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from judges.estimators import by_counts, expected_pass_at_k, posterior
from judges.labels import LabelSettings, label
from judges.selection import (
    RULES,
    SelectionSettings,
    choose,
    easiness,
    quantile_count,
    reason,
    select,
    summarise,
)
from posttrain.types import Action, Label, Outcome, Verdict


def verdict(prompt_id: str, n: int, c: int) -> Verdict:
    said = label(n, c, cap=n, settings=LabelSettings())
    assert said is not None
    return Verdict(
        prompt_id=prompt_id,
        judge="critic",
        critic="f00",
        num_samples=n,
        num_correct=c,
        outcomes={Outcome.CORRECT: c, Outcome.WRONG: n - c},
        posterior=posterior(n, c),
        label=said,
        decided_by="cap",
        sampling={},
    )


counts = st.integers(1, 16).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))
verdict_lists = st.lists(counts, max_size=60).map(
    lambda pairs: [verdict(f"p{i}", n, c) for i, (n, c) in enumerate(pairs)]
)


def ids(decisions, action):
    return {d.prompt_id for d in decisions if d.action is action}


def test_drop_easiest_half():
    verdicts = [verdict(f"p{c}", 8, c) for c in range(8)]
    decisions = select(verdicts, SelectionSettings(drop_easiest=0.5))
    assert [d.action for d in decisions] == [Action.KEEP] * 4 + [Action.DROP] * 4
    # (7+.5)/9 = .833 for the easiest, (3+.5)/9 = .389 for the first kept.
    assert decisions[7].rule == "drop_easiest"
    assert decisions[7].reason == (
        "pass@1 0.833 (7 of 8 correct) is among the easiest 50% (the easiest kept has 0.389)"
    )
    assert decisions[0].reason.startswith("pass@1 0.056 (0 of 8 correct) is not among the easiest")
    assert decisions[3].verdict is verdicts[3]


def test_easy_above():
    verdicts = [verdict("a", 16, 16), verdict("b", 16, 13), verdict("c", 16, 0)]
    decisions = select(verdicts, SelectionSettings(easy_above=0.9))
    assert ids(decisions, Action.DROP) == {"a"}
    assert decisions[0].reason == "pass@1 0.971 (16 of 16 correct) is above 0.9"
    assert decisions[1].reason == "pass@1 0.794 (13 of 16 correct) is not above 0.9"
    assert {d.rule for d in decisions} == {"easy_above"}


def test_pass_at_k_calls_easy_what_pass_at_1_keeps():
    verdicts = [verdict("a", 16, 5)]
    kept = select(verdicts, SelectionSettings(easy_above=0.9))
    dropped = select(verdicts, SelectionSettings(metric="pass@k", k=8, easy_above=0.9))
    assert kept[0].action is Action.KEEP
    assert dropped[0].action is Action.DROP
    assert dropped[0].reason.startswith("pass@8 0.9")


@pytest.mark.parametrize(
    ("share", "total", "expected"),
    [(0.29, 100, 29), (0.95, 20, 19), (0.5, 5, 2), (0.0, 7, 0), (0.999, 3, 2), (0.5, 0, 0)],
)
def test_quantile_count_is_not_fooled_by_binary_fractions(share, total, expected):
    assert quantile_count(share, total) == expected


@given(verdict_lists, st.sampled_from([0.0, 0.1, 0.29, 0.5, 0.75, 0.9]))
def test_exactly_the_share_is_dropped(verdicts, share):
    decisions = select(verdicts, SelectionSettings(drop_easiest=share))
    assert len(ids(decisions, Action.DROP)) == quantile_count(share, len(verdicts))
    assert [d.prompt_id for d in decisions] == [v.prompt_id for v in verdicts]


all_settings = st.builds(
    lambda cut, k, unsolved: SelectionSettings(
        **cut, metric="pass@k" if k else "pass@1", k=k, drop_unsolved=unsolved
    ),
    st.one_of(
        st.floats(0, 0.99).map(lambda q: {"drop_easiest": q}),
        st.floats(0.01, 0.99).map(lambda t: {"easy_above": t}),
    ),
    st.sampled_from([None, 4]),
    st.sampled_from([None, True, False]),
)


@given(verdict_lists, all_settings, st.randoms(use_true_random=False))
def test_order_changes_nothing(verdicts, settings, rng: random.Random):
    shuffled = rng.sample(verdicts, len(verdicts))
    by_id = {d.prompt_id: d for d in select(verdicts, settings)}
    assert all(by_id[d.prompt_id] == d for d in select(shuffled, settings))


@given(verdict_lists, all_settings)
def test_a_dropped_prompt_is_never_harder_than_a_kept_one(verdicts, settings):
    decisions = select(verdicts, settings)
    too_easy = [d.verdict for d in decisions if d.action is Action.DROP]
    too_easy = [v for v in too_easy if v.label is not Label.UNSOLVED]
    kept = [d.verdict for d in decisions if d.action is Action.KEEP]
    if too_easy and kept:
        hardest_dropped = min(easiness(v, settings) for v in too_easy)
        assert hardest_dropped >= max(easiness(v, settings) for v in kept)


def test_unsolved_are_dropped_by_default_only_above_ninety_percent():
    verdicts = [verdict(f"p{i}", 16, i % 16) for i in range(1600)]  # 100 of them unsolved
    half = summarise(select(verdicts, SelectionSettings(drop_easiest=0.9)))
    assert (half.kept, half.dropped) == (160, 1440)
    assert half.unsolved_share == 100 / 160
    tail = select(verdicts, SelectionSettings(drop_easiest=0.95))
    # 1500 are left without the unsolved, 95% of them go: 1425 + 100.
    summary = summarise(tail)
    assert (summary.kept, summary.dropped, summary.unsolved_share) == (75, 1525, 0.0)
    assert summary.dropped_by_label[Label.UNSOLVED] == 100
    assert {d.rule for d in tail if d.verdict.label is Label.UNSOLVED} == {"drop_unsolved"}
    switched_off = select(verdicts, SelectionSettings(drop_easiest=0.95, drop_unsolved=False))
    assert summarise(switched_off).unsolved_share == 1.0


def test_unsolved_rule_follows_what_a_threshold_really_drops():
    mostly_easy = [verdict(f"p{i}", 16, 16) for i in range(19)] + [verdict("u", 16, 0)]
    assert ids(select(mostly_easy, SelectionSettings(easy_above=0.9)), Action.KEEP) == set()
    half_easy = mostly_easy[9:]
    half_easy += [verdict(f"m{i}", 16, 8) for i in range(3)]
    assert "u" in ids(select(half_easy, SelectionSettings(easy_above=0.9)), Action.KEEP)


def test_ties_do_not_follow_the_order_of_ids():
    verdicts = [verdict(f"p{i:03d}", 8, 4) for i in range(100)]
    dropped = ids(select(verdicts, SelectionSettings(drop_easiest=0.5)), Action.DROP)
    assert len(dropped) == 50
    assert 10 < len(dropped & {f"p{i:03d}" for i in range(50)}) < 40


def test_summary_counts_labels_and_knows_absent():
    verdicts = [verdict("e", 16, 16), verdict("m", 16, 8), verdict("u", 16, 0)]
    summary = summarise(select(verdicts, SelectionSettings(easy_above=0.9)))
    assert summary.kept_by_label == {Label.MEDIUM: 1, Label.UNSOLVED: 1}
    assert summary.dropped_by_label == {Label.EASY: 1}
    assert summary.unsolved_share == 0.5
    assert summarise([]).unsolved_share is None


def test_each_domain_gives_its_own_share():
    easy = [verdict(f"e{c}", 8, c) for c in range(4, 8)]
    hard = [verdict(f"h{c}", 8, c) for c in range(4)]
    domains = {v.prompt_id: v.prompt_id[0] for v in easy + hard}
    together = select(easy + hard, SelectionSettings(drop_easiest=0.5), domains)
    assert ids(together, Action.DROP) == {"e4", "e5", "e6", "e7"}
    apart = select(easy + hard, SelectionSettings(drop_easiest=0.5, by_domain=True), domains)
    assert ids(apart, Action.DROP) == {"e6", "e7", "h2", "h3"}
    # (5+.5)/9 is the easiest kept of its domain.
    assert apart[3].reason == (
        "pass@1 0.833 (7 of 8 correct) is among the easiest 50% of its domain "
        "(the easiest kept has 0.611)"
    )


def test_a_domain_keeps_its_minimum_and_the_hardest_of_it():
    verdicts = [verdict(f"e{c}", 8, c) for c in range(5, 9)] + [
        verdict(f"h{c}", 8, c) for c in (0, 1)
    ]
    domains = {v.prompt_id: v.prompt_id[0] for v in verdicts}
    settings = SelectionSettings(easy_above=0.5, min_per_domain=2)
    decisions = select(verdicts, settings, domains)
    assert ids(decisions, Action.KEEP) == {"e5", "e6", "h0", "h1"}
    assert [d.rule for d in decisions] == ["min_per_domain"] * 2 + ["easy_above"] * 4
    assert decisions[0].reason == (
        "pass@1 0.611 (5 of 8 correct) is too easy, but its domain keeps at least 2"
    )
    # A domain cannot keep more than it has, and the unsolved are not taken back.
    many = settings.model_copy(update={"min_per_domain": 9, "drop_unsolved": True})
    assert ids(select(verdicts, many, domains), Action.DROP) == {"h0"}


def test_a_million_prompts_are_chosen_among_in_seconds():
    rng = np.random.default_rng(0)
    num = 1_000_000
    scored = rng.integers(4, 17, num)
    correct = (scored * rng.random(num)).astype(int)
    values = by_counts(scored, correct, lambda n, c: expected_pass_at_k(*posterior(n, c), 1))
    ties, domains = rng.integers(0, 2**63, num, dtype=np.uint64), rng.integers(0, 8, num)
    began = time.perf_counter()
    settings = SelectionSettings(drop_easiest=0.5, by_domain=True, min_per_domain=100)
    selection = choose(values, np.zeros(num, dtype=bool), domains, ties, settings)
    assert time.perf_counter() - began < 5
    counts = np.bincount(domains)
    assert [*np.bincount(domains, ~selection.kept)] == [*(counts // 2)]


def test_what_is_low_goes_first_for_a_judge_that_looks_once():
    grades = np.array([4.5, 1.5, 3.0, 2.5])
    none, domains = np.zeros(4, dtype=bool), np.zeros(4, dtype=int)
    ties = np.arange(4, dtype=np.uint64)
    half = SelectionSettings(metric="grade", drop_easiest=0.5)
    selection = choose(-grades, none, domains, ties, half)
    assert list(selection.kept) == [True, False, True, False]
    below = SelectionSettings(metric="grade", drop_below=3.0)
    assert list(choose(-grades, none, domains, ties, below).kept) == [True, False, True, False]
    assert reason("drop_below", False, easiness=-1.5, counts=None, cut=-3.0, settings=below) == (
        "grade 1.500 is below 3"
    )
    assert reason("drop_easiest", True, easiness=-3.0, counts=None, cut=-3.0, settings=half) == (
        "grade 3.000 is not among the lowest 50% (the lowest kept has 3.000)"
    )
    ifd = SelectionSettings(metric="ifd", drop_easiest=0.5)
    above = choose(
        -np.array([0.2, 1.3, 0.9]), np.array([0, 1, 0], bool), domains[:3], ties[:3], ifd
    )
    assert list(above.kept) == [False, False, True]
    assert [RULES[r] for r in above.rule] == ["drop_easiest", "ifd_above_1", "drop_easiest"]


def test_two_verdicts_of_one_prompt_are_refused():
    with pytest.raises(ValueError, match="prompt a has 2 verdicts"):
        select([verdict("a", 8, 1), verdict("a", 8, 2)], SelectionSettings(drop_easiest=0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of drop_easiest and easy_above"),
        ({"drop_easiest": 0.5, "easy_above": 0.9}, "exactly one"),
        ({"drop_easiest": 1.0}, "drop_easiest"),
        ({"drop_easiest": 0.5, "metric": "pass@k"}, "k goes with metric pass@k"),
        ({"drop_easiest": 0.5, "k": 4}, "k goes with metric pass@k"),
        ({"easy_above": 0.5, "by_domain": True}, "by_domain goes with drop_easiest"),
        ({"drop_below": 0.5}, "exactly one of drop_easiest and easy_above for pass@1"),
        ({"metric": "ifd", "easy_above": 0.5}, "exactly one of drop_easiest and drop_below"),
        ({"metric": "grade", "drop_easiest": 0.5, "drop_below": 2.0}, "exactly one of"),
        ({"metric": "grade", "drop_easiest": 0.5, "k": 4}, "k goes with metric pass@k"),
    ],
)
def test_settings_that_contradict_themselves(settings, message):
    with pytest.raises(ValidationError, match=message):
        SelectionSettings(**settings)
