"""Which groups are worth a step, and what is said when none is."""

from __future__ import annotations

import dataclasses

import pytest
from online_fakes import make_group, make_reward

from posttrain.errors import StarvationError
from posttrain.online.gate import Ended, Reason, classify
from posttrain.online.starvation import StarvationWatch
from posttrain.types import DrawOutcome, Outcome, Reward


@pytest.mark.parametrize(
    ("marks", "outcome", "reason"),
    [
        ("10", None, None),
        ("1u", None, None),
        ("1?0", None, None),
        ("11", DrawOutcome.ZERO_ADVANTAGE, Reason.ALL_CORRECT),
        ("1?1", DrawOutcome.ZERO_ADVANTAGE, Reason.ALL_CORRECT),
        ("0tu", DrawOutcome.ZERO_ADVANTAGE, Reason.NONE_CORRECT),
        ("1??", DrawOutcome.ERRORED, Reason.UNSCORED),
        ("??", DrawOutcome.ERRORED, Reason.UNSCORED),
    ],
)
def test_classify(marks: str, outcome: DrawOutcome | None, reason: Reason | None) -> None:
    ended = classify(make_group(marks))
    if outcome is None or reason is None:
        assert ended is None
    else:
        assert ended == Ended(outcome=outcome, reason=reason)


def _with_rewards(*rewards: Reward) -> Ended | None:
    return classify(dataclasses.replace(make_group("0" * len(rewards)), rewards=rewards))


def test_only_raw_correctness_counts() -> None:
    """Length and format terms make values differ; that alone is no signal."""
    shaped = [
        Reward(value=value, correctness=1.0, outcome=Outcome.CORRECT) for value in (1.0, 0.75, 0.5)
    ]
    ended = _with_rewards(*shaped)
    assert ended is not None
    assert ended.reason is Reason.ALL_CORRECT


def test_partial_scores_are_signal_and_equal_ones_are_not() -> None:
    tenth = Reward(value=0.1, correctness=0.1, outcome=Outcome.WRONG)
    fifth = Reward(value=0.2, correctness=0.2, outcome=Outcome.WRONG)
    assert _with_rewards(tenth, fifth, tenth) is None
    ended = _with_rewards(*[tenth] * 6)  # np.std of these is not 0
    assert ended == Ended(outcome=DrawOutcome.ZERO_ADVANTAGE, reason=Reason.NONE_CORRECT)


def test_gate_reads_unscored_as_absent_not_as_zero() -> None:
    ended = _with_rewards(make_reward("1"), make_reward("1"), make_reward("?"))
    assert ended is not None
    assert ended.reason is Reason.ALL_CORRECT


@pytest.mark.parametrize(
    ("commonest", "remedy"),
    [
        (Reason.ALL_CORRECT, "too easy"),
        (Reason.NONE_CORRECT, "too hard"),
        (Reason.UNSCORED, "reward workers"),
        (Reason.DEADLINE, "rl.draw_deadline_s"),
    ],
)
def test_starvation_counts_reasons_and_names_the_bound(commonest: Reason, remedy: str) -> None:
    watch = StarvationWatch(10)
    for reason in Reason:
        # The watch hears of the gate's ends only.
        if reason not in (commonest, Reason.STAGE_ENDED, Reason.NOT_FINITE):
            watch.ended(reason)
    for _ in range(6):
        watch.ended(commonest)
    with pytest.raises(StarvationError, match=remedy) as raised:
        watch.ended(commonest)
    counts = {
        Reason.ALL_CORRECT: "all correct",
        Reason.NONE_CORRECT: "none correct",
        Reason.UNSCORED: "unscored",
        Reason.DEADLINE: "past the deadline",
    }
    for reason, words in counts.items():
        assert f"{7 if reason is commonest else 1} {words}" in str(raised.value)
    assert "10 draws in a row" in str(raised.value)


def test_one_trainable_group_breaks_the_row() -> None:
    watch = StarvationWatch(3)
    for _ in range(5):
        watch.ended(Reason.ALL_CORRECT)
        watch.ended(Reason.NONE_CORRECT)
        watch.trainable()
    watch.ended(Reason.ALL_CORRECT)
    watch.ended(Reason.ALL_CORRECT)
    with pytest.raises(StarvationError, match="3 all correct, 0 none correct"):
        watch.ended(Reason.ALL_CORRECT)
