"""Rewards from scores: the weighted terms, and what is scored without asking a verifier."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from rewards_fakes import TASK, rollout

from posttrain.errors import DataError
from posttrain.types import Outcome, Prompt, SystemInstruction
from rewards.score import Score, failed, right
from rewards.scorer import score_rollouts
from rewards.shaping import OverlongPenalty, RewardSettings, combine, overlong

BRACKETS = SystemInstruction(name="brackets", text="Answer in brackets.", pattern=r".*#\[.*\]")


@pytest.mark.parametrize(
    ("num_tokens", "penalty"),
    [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1.0), (500, -1.0)],
)
def test_overlong_ramp(num_tokens: int, penalty: float) -> None:
    ramp = OverlongPenalty(limit=100, buffer=20)
    assert overlong(num_tokens, ramp) == pytest.approx(penalty)


def test_a_buffer_larger_than_the_limit_is_refused() -> None:
    with pytest.raises(ValidationError, match="buffer 101 is larger than limit 100"):
        OverlongPenalty(limit=100, buffer=101)


def test_without_settings_the_value_is_the_correctness() -> None:
    reward = combine(right(), {}, TASK, rollout("#2"), None, RewardSettings())
    assert (reward.value, reward.correctness, reward.components) == (1.0, 1.0, {"correctness": 1.0})


def test_every_term_enters_with_its_weight_and_correctness_stays_alone() -> None:
    settings = RewardSettings(
        instruction_weight=0.25,
        overlong_penalty=OverlongPenalty(limit=100, buffer=20, weight=0.5),
    )
    followed = combine(right(), {}, TASK, rollout("#[2]", num_tokens=90), BRACKETS, settings)
    assert followed.components == {"correctness": 1.0, "instruction": 1.0, "length": -0.5}
    assert followed.value == pytest.approx(1 + 0.25 - 0.25)
    assert followed.correctness == 1.0

    partly = Score(correctness=0.5, outcome=Outcome.WRONG, explanation="half")
    ignored = combine(partly, {}, TASK, rollout("#2", num_tokens=100), BRACKETS, settings)
    assert ignored.components == {"correctness": 0.5, "instruction": 0.0, "length": -1.0}
    assert ignored.value == pytest.approx(0.5 - 0.5)
    assert (ignored.correctness, ignored.explanation) == (0.5, "half")


def test_the_pattern_must_match_in_full() -> None:
    settings = RewardSettings(instruction_weight=1.0)
    assert combine(right(), {}, TASK, rollout("#[2] or so"), BRACKETS, settings).value == 1.0
    assert combine(right(), {}, TASK, rollout("#[2]"), BRACKETS, settings).value == 2.0


def test_an_instruction_without_a_pattern_adds_nothing() -> None:
    unchecked = SystemInstruction(name="polite", text="Be polite.")
    settings = RewardSettings(instruction_weight=1.0)
    assert combine(right(), {}, TASK, rollout("#2"), unchecked, settings).components == {
        "correctness": 1.0
    }


@pytest.mark.parametrize("outcome", [Outcome.TRUNCATED, Outcome.LIMIT])
def test_what_was_stopped_earns_nothing_for_its_form(outcome: Outcome) -> None:
    settings = RewardSettings(instruction_weight=1.0)
    reward = combine(failed(outcome, ""), {}, TASK, rollout("#[2]"), BRACKETS, settings)
    assert (reward.value, reward.components["instruction"]) == (0.0, 0.0)


def test_a_group_is_scored_in_order() -> None:
    group = [
        rollout("#2"),
        rollout("#3"),
        rollout("2"),
        rollout("#2", finish_reason="length"),
        rollout("1+1=2#[2]"),
    ]
    rewards = score_rollouts(TASK, group, None, RewardSettings())
    assert [reward.outcome for reward in rewards] == [
        Outcome.CORRECT,
        Outcome.WRONG,
        Outcome.UNPARSABLE,
        Outcome.TRUNCATED,
        Outcome.CORRECT,
    ]
    assert [reward.value for reward in rewards] == [1.0, 0.0, 0.0, 0.0, 1.0]


def raising(prompt: Prompt, text: str) -> Score:
    raise {"memory": MemoryError, "deep": RecursionError, "away": ConnectionError}[text](text)


def test_what_the_answer_breaks_scores_zero_and_what_breaks_elsewhere_is_unscored() -> None:
    settings = RewardSettings(default_verifier="raising")
    group = [rollout("memory"), rollout("deep"), rollout("away")]
    rewards = score_rollouts(TASK, group, None, settings, {"raising": raising})
    assert [(reward.value, reward.outcome) for reward in rewards] == [
        (0.0, Outcome.LIMIT),
        (0.0, Outcome.LIMIT),
        (None, Outcome.INFRASTRUCTURE),
    ]
    assert "ConnectionError" in rewards[2].explanation


def test_an_unknown_verifier_is_a_data_error() -> None:
    with pytest.raises(DataError, match=TASK.prompt_id):
        score_rollouts(TASK, [rollout("#2")], None, RewardSettings(default_verifier="nope"))
