"""Rewards of one's own, and verifiers that are added to the one that decides."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from rewards_fakes import TASK, rollout, score

from posttrain.errors import DataError, SettingsError
from posttrain.types import Outcome
from rewards.custom import source_hash
from rewards.pool import ScorerPool
from rewards.scorer import score_rollouts
from rewards.shaping import RewardSettings
from rewards.verifiers import check_references

SHORT = {"short": "custom_rewards:short"}


def custom(path: str) -> RewardSettings:
    return RewardSettings(default_verifier="own", custom={"own": path})


def test_a_custom_function_decides_in_a_pool_of_processes() -> None:
    with ScorerPool(1, custom("custom_rewards:short")) as pool:
        good, long = score(pool, "brief", "x" * 20)
    assert (good.outcome, good.value) == (Outcome.CORRECT, 1.0)
    assert (long.outcome, long.correctness) == (Outcome.WRONG, 0.25)


def test_a_custom_function_may_return_a_score() -> None:
    (reward,) = score_rollouts(TASK, [rollout("x")], None, custom("custom_rewards:found"))
    assert (reward.value, reward.outcome, reward.explanation) == (0.5, Outcome.WRONG, "sums: half")


@pytest.mark.parametrize("text", ["high", "nan", "none", "unheard of"])
def test_what_is_no_score_leaves_the_answer_unscored(text: str) -> None:
    (reward,) = score_rollouts(TASK, [rollout(text)], None, custom("custom_rewards:says"))
    assert (reward.value, reward.outcome) == (None, Outcome.INFRASTRUCTURE)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("custom_rewards", "module:function"),
        ("no_such_module:f", "no_such_module cannot be imported .*PYTHONPATH"),
        ("custom_rewards:nope", "no function 'nope'"),
        ("custom_rewards:NUMBER", "no function 'NUMBER'"),
        ("custom_rewards:one_argument", r"called with \(prompt, text\)"),
        ("custom_rewards:asynchronous", "not an async one"),
    ],
)
def test_an_unusable_function_is_refused_by_name(path: str, message: str) -> None:
    settings = custom(path)
    with pytest.raises(SettingsError, match=message) as caught:
        check_references([TASK], settings)
    assert "rewards.custom.own" in str(caught.value)


def test_a_source_is_known_by_what_stands_in_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "hashed_reward.py"
    module.write_text("from operator import eq as same\nfrom math import fmod\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    first = source_hash("own", "hashed_reward:same")
    assert source_hash("own", "hashed_reward:fmod") == first
    module.write_text("from operator import ne as same\n")
    assert source_hash("own", "hashed_reward:same") != first
    with pytest.raises(SettingsError, match=r"rewards\.custom\.own = _operator:eq: .* has no file"):
        source_hash("own", "_operator:eq")


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"custom\.maths: there is a verifier of that name"):
        check_references([TASK], RewardSettings(custom={"maths": "custom_rewards:short"}))


def test_data_cannot_name_a_function() -> None:
    with pytest.raises(DataError, match="'custom_rewards:short'; there are"):
        score_rollouts(
            TASK, [rollout("x")], None, RewardSettings(default_verifier="custom_rewards:short")
        )


def test_added_verifiers_shape_the_value_and_leave_correctness_alone() -> None:
    settings = RewardSettings(custom=SHORT, added={"sums": {"short": 0.5}, "other": {"short": 9}})
    right, wrong, cut = score_rollouts(
        TASK,
        [rollout("#2"), rollout("123456789#3"), rollout("#2", finish_reason="length")],
        None,
        settings,
    )
    assert (right.value, right.correctness, right.outcome) == (1.5, 1.0, Outcome.CORRECT)
    assert right.components == {"correctness": 1.0, "short": 1.0}
    assert (wrong.value, wrong.correctness, wrong.outcome) == (0.125, 0.0, Outcome.WRONG)
    assert (cut.value, cut.outcome) == (0.0, Outcome.TRUNCATED)


def test_a_term_that_could_not_be_found_leaves_the_whole_unscored() -> None:
    settings = RewardSettings(custom={"says": "custom_rewards:says"}, added={"sums": {"says": 1}})
    (reward,) = score_rollouts(TASK, [rollout("#2")], None, settings)
    assert (reward.value, reward.outcome) == (None, Outcome.INFRASTRUCTURE)


def test_an_added_verifier_that_is_not_there_is_found_at_load() -> None:
    with pytest.raises(DataError, match=r"'judge'; there are .*set rewards\.judge"):
        check_references([TASK], RewardSettings(added={"sums": {"judge": 1}}))


def test_a_program_must_be_stopped_before_its_verifier_is() -> None:
    with pytest.raises(ValidationError, match=r"code.answer_s = 8 must be below .* 5 s"):
        RewardSettings(deadlines_s={"code": 5})
    with pytest.raises(ValidationError, match="greater than 0"):
        RewardSettings(added={"sums": {"short": -1}}, custom=SHORT)
