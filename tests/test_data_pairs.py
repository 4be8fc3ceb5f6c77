"""Preference pairs: each corner case has its rule, and none teaches something else by the way."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from online_fakes import make_group, make_rollout
from pydantic import ValidationError

from posttrain.data.pairs import CornerCase, MiningSettings, mine_pairs
from posttrain.types import (
    Outcome,
    PolicyVersion,
    PreferencePair,
    Reward,
    Rollout,
    RolloutGroup,
)

Answer = tuple[Rollout, Reward]


def answer(
    text: str,
    outcome: Outcome,
    *,
    length: int = 10,
    follows: float | None = None,
    value: float | None = None,
) -> Answer:
    """A scored answer; `value` stands for shaping terms on top of correctness."""
    truncated = outcome is Outcome.TRUNCATED
    unscored = outcome is Outcome.INFRASTRUCTURE
    correctness = None if unscored else float(outcome is Outcome.CORRECT)
    rollout = make_rollout("d", 0, text, PolicyVersion(1, 0), length)
    reward = Reward(
        value=correctness if value is None else value,
        correctness=correctness,
        outcome=outcome,
        components={} if follows is None else {"instruction": follows},
    )
    return replace(rollout, finish_reason="length" if truncated else "stop"), reward


def group(*answers: Answer) -> RolloutGroup:
    rollouts = tuple(replace(a[0], rollout_id=f"d/{i}") for i, a in enumerate(answers))
    return replace(
        make_group("0"), system="brief", rollouts=rollouts, rewards=tuple(a[1] for a in answers)
    )


def mine(case: CornerCase, *answers: Answer, **settings: float) -> list[tuple[str, str]]:
    """(chosen, rejected) of every pair of one case."""
    changed = {"cases": [case], "pairs_per_prompt": 8} | settings
    return [
        (p.chosen, p.rejected)
        for p in mine_pairs(group(*answers), MiningSettings.model_validate(changed))
    ]


CORRECT, WRONG, UNPARSABLE = Outcome.CORRECT, Outcome.WRONG, Outcome.UNPARSABLE
TRUNCATED, LIMIT, UNSCORED = Outcome.TRUNCATED, Outcome.LIMIT, Outcome.INFRASTRUCTURE


def test_a_pair_records_prompt_system_case_and_margin() -> None:
    mined = group(answer("good", CORRECT, value=1.25), answer("bad", WRONG, value=0.5))
    (pair,) = mine_pairs(mined, MiningSettings())
    assert pair == PreferencePair(
        prompt=mined.prompt,
        system="brief",
        chosen="good",
        rejected="bad",
        corner_case="wrong",
        margin=0.75,
    )


@pytest.mark.parametrize(
    ("lengths", "paired"),
    [((10, 10), True), ((10, 14), True), ((14, 10), True), ((10, 15), False), ((15, 10), False)],
)
def test_wrong_needs_matched_lengths(lengths: tuple[int, int], paired: bool) -> None:
    pairs = mine(
        "wrong",
        answer("good", CORRECT, length=lengths[0]),
        answer("bad", WRONG, length=lengths[1]),
    )
    assert pairs == ([("good", "bad")] if paired else [])


@pytest.mark.parametrize("rejected", [UNPARSABLE, TRUNCATED, LIMIT, UNSCORED, CORRECT])
def test_wrong_rejects_wrong_answers_only(rejected: Outcome) -> None:
    assert mine("wrong", answer("good", CORRECT), answer("other", rejected)) == []


def test_wrong_keeps_the_form_equal() -> None:
    good, bad = answer("good", CORRECT, follows=1.0), answer("bad", WRONG, follows=0.0)
    assert mine("wrong", good, bad) == []
    assert mine("wrong", good, answer("bad", WRONG, follows=1.0)) == [("good", "bad")]


@pytest.mark.parametrize("case", ["instruction", "malformed", "overlong", "wrong"])
def test_what_ignores_its_instruction_is_never_chosen(case: CornerCase) -> None:
    ignoring = [
        answer(f"{outcome}{length}", outcome, follows=0.0, length=length)
        for outcome in (CORRECT, WRONG, UNPARSABLE)
        for length in (10, 12, 40)
    ]
    assert mine(case, *ignoring) == []


@pytest.mark.parametrize(
    ("chosen", "paired"),
    [(CORRECT, True), (WRONG, False), (LIMIT, False), (TRUNCATED, False), (UNPARSABLE, False)],
)
def test_malformed_prefers_what_can_be_read_and_is_right(chosen: Outcome, paired: bool) -> None:
    pairs = mine("malformed", answer("form", chosen), answer("mess", UNPARSABLE))
    assert pairs == ([("form", "mess")] if paired else [])


@pytest.mark.parametrize(("length", "paired"), [(6, False), (7, True), (14, True), (15, False)])
def test_malformed_teaches_no_length(length: int, paired: bool) -> None:
    pairs = mine("malformed", answer("form", CORRECT, length=length), answer("mess", UNPARSABLE))
    assert bool(pairs) == paired


@pytest.mark.parametrize(
    ("chosen", "rejected", "paired"),
    [(None, None, True), (1.0, 0.0, True), (1.0, 1.0, True), (0.0, 0.0, False), (0.0, 1.0, False)],
)
def test_malformed_never_teaches_to_ignore_an_instruction(
    chosen: float | None, rejected: float | None, paired: bool
) -> None:
    pairs = mine(
        "malformed",
        answer("form", CORRECT, follows=chosen),
        answer("mess", UNPARSABLE, follows=rejected),
    )
    assert bool(pairs) == paired


@pytest.mark.parametrize(("length", "paired"), [(19, False), (20, True), (90, True)])
def test_overlong_wants_the_ratio_and_two_correct_answers(length: int, paired: bool) -> None:
    short = answer("short", CORRECT, length=10)
    pairs = mine("overlong", answer("long", CORRECT, length=length), short)
    assert pairs == ([("short", "long")] if paired else [])
    assert mine("overlong", answer("long", WRONG, length=length), short) == []
    assert mine("overlong", answer("long", CORRECT, length=90, follows=1.0), short) == []


@pytest.mark.parametrize(
    ("short_wrong", "long_wrong", "paired"),
    [(0, 0, True), (1, 1, True), (1, 2, True), (2, 1, False)],
)
def test_answers_that_are_long_for_a_reason_are_not_overlong(
    short_wrong: int, long_wrong: int, paired: bool
) -> None:
    """One of each length is right, and so many beside it are wrong."""
    guesses = [answer(f"guess {i}", WRONG, length=8) for i in range(short_wrong)]
    tries = [answer(f"try {i}", WRONG, length=40) for i in range(long_wrong)]
    between = answer("between", WRONG, length=20)
    short, long = answer("short", CORRECT, length=10), answer("long", CORRECT, length=30)
    pairs = mine("overlong", *guesses, long, between, short, *tries)
    assert pairs == ([("short", "long")] if paired else [])


@pytest.mark.parametrize(
    ("chosen", "rejected", "paired"),
    [
        (CORRECT, CORRECT, True),
        (WRONG, WRONG, True),
        (WRONG, UNPARSABLE, True),
        (WRONG, CORRECT, False),
        (CORRECT, WRONG, True),
        (TRUNCATED, WRONG, False),
    ],
)
def test_instruction_prefers_the_follower_unless_the_other_alone_is_right(
    chosen: Outcome, rejected: Outcome, paired: bool
) -> None:
    followed, ignored = answer("yes", chosen, follows=1.0), answer("no", rejected, follows=0.0)
    assert mine("instruction", ignored, followed) == ([("yes", "no")] if paired else [])


def test_instruction_needs_one_that_can_be_checked() -> None:
    assert mine("instruction", answer("a", CORRECT), answer("b", CORRECT, length=30)) == []


def test_cases_come_in_the_order_of_the_settings() -> None:
    answers = (
        answer("short", CORRECT, length=10),
        answer("long", CORRECT, length=40),
        answer("bad", WRONG, length=12),
    )
    for first, rejected in (("overlong", "long"), ("wrong", "bad")):
        cases = [first, *({"overlong", "wrong"} - {first})]
        settings = MiningSettings.model_validate({"cases": cases})
        # The short answer is used up by whichever case comes first.
        (pair,) = mine_pairs(group(*answers), settings)
        assert (pair.corner_case, pair.chosen, pair.rejected) == (first, "short", rejected)


def test_the_same_text_twice_makes_one_pair() -> None:
    answers = (answer("good", CORRECT), answer("good", CORRECT), answer("bad", WRONG))
    assert mine("wrong", *answers, answer("bad", WRONG)) == [("good", "bad")]
    assert mine("wrong", *answers, answer("worse", WRONG)) == [("good", "bad")]


@pytest.mark.parametrize("cap", [1, 2, 3])
def test_pairs_are_capped(cap: int) -> None:
    good = [answer(f"good {i}", CORRECT) for i in range(3)]
    bad = [answer(f"bad {i}", WRONG) for i in range(3)]
    pairs = mine("wrong", *good, *bad, pairs_per_prompt=cap)
    assert pairs == [(f"good {i}", f"bad {i}") for i in range(cap)]


@pytest.mark.parametrize(
    "fields",
    [{"overlong_ratio": 1}, {"matched_ratio": 1}, {"samples": 1}, {"pairs_per_prompt": 0}],
)
def test_settings_out_of_bounds(fields: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        MiningSettings.model_validate(fields)


answers_of_any_kind = st.builds(
    answer,
    st.sampled_from("abcdef"),
    st.sampled_from(list(Outcome)),
    length=st.integers(1, 40),
    follows=st.sampled_from([None, 0.0, 1.0]),
)


@given(st.lists(answers_of_any_kind, max_size=10), st.permutations(MiningSettings().cases))
def test_whatever_is_mined_obeys_the_common_rules(
    answers: list[Answer], cases: list[CornerCase]
) -> None:
    settings = MiningSettings(cases=cases, pairs_per_prompt=3)
    mined = group(*answers)
    pairs = mine_pairs(mined, settings)
    assert len(pairs) <= 3
    texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    assert len(set(texts)) == len(texts)
    order = [cases.index(pair.corner_case) for pair in pairs]  # type: ignore[arg-type]
    assert order == sorted(order)
    for pair in pairs:
        assert math.isfinite(pair.margin)
        assert any(
            not rollout.truncated and reward.value is not None
            for rollout, reward in zip(mined.rollouts, mined.rewards, strict=True)
            if rollout.text == pair.chosen
        )
        assert any(
            reward.value is not None
            for rollout, reward in zip(mined.rollouts, mined.rewards, strict=True)
            if rollout.text == pair.rejected
        )


@given(st.lists(answers_of_any_kind, max_size=8))
def test_no_pair_is_missed_while_there_is_room(answers: list[Answer]) -> None:
    """Whatever two unused texts are left, no case fits them; but overlong, which asks the whole
    group."""
    settings = MiningSettings(cases=["instruction", "malformed", "wrong"], pairs_per_prompt=8)
    mined = group(*answers)
    used = {t for pair in mine_pairs(mined, settings) for t in (pair.chosen, pair.rejected)}
    left = [a for a in answers if a[0].text not in used]
    for one, other in combinations(left, 2):
        assert mine_pairs(group(one, other), settings) == []
