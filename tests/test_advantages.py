"""Advantages of a group's rewards, and the samples made of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.advantages import (
    ADVANTAGES,
    bessel_std,
    group_to_samples,
    is_zero_advantage,
    leave_one_out,
    mean_centred,
)
from posttrain.types import (
    Message,
    Outcome,
    PolicyVersion,
    Prompt,
    Reward,
    Rollout,
    RolloutGroup,
    Sampling,
    VersionSpan,
)

REWARDS = np.array([1.0, 0.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("advantage", "first", "rest"),
    [(mean_centred, 0.75, -0.25), (bessel_std, 1.4997, -0.4999), (leave_one_out, 1.0, -1 / 3)],
)
def test_one_of_four_correct(advantage, first, rest):
    np.testing.assert_allclose(advantage(REWARDS), [first, rest, rest, rest], atol=2e-5)


def test_population_std_is_the_bessel_variant_with_another_divisor():
    population = bessel_std(REWARDS, eps=0.0) * np.sqrt(4 / 3)
    np.testing.assert_allclose(population, [1.73205, -0.57735, -0.57735, -0.57735], atol=1e-5)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=16))
def test_leave_one_out_compares_with_the_mean_of_the_others(rewards):
    others = [np.mean(rewards[:i] + rewards[i + 1 :]) for i in range(len(rewards))]
    np.testing.assert_allclose(
        leave_one_out(np.array(rewards)), np.array(rewards) - others, atol=1e-12
    )


@given(st.sampled_from(sorted(ADVANTAGES)), st.lists(st.floats(0, 1), min_size=2, max_size=16))
def test_advantages_sum_to_zero(kind, rewards):
    assert abs(ADVANTAGES[kind](np.array(rewards)).sum()) < 1e-8


@given(
    st.sampled_from(sorted(ADVANTAGES)),
    st.lists(st.integers(0, 8), min_size=2, max_size=16),
    st.sampled_from([0.25, 0.5, 4.0]),
    st.integers(-5, 5),
)
def test_a_shift_of_all_rewards_changes_nothing_and_their_scale_only_what_std_leaves(
    kind, rewards, scale, shift
):
    rewards = np.array(rewards) / 8
    advantages = ADVANTAGES[kind](rewards)
    np.testing.assert_allclose(ADVANTAGES[kind](rewards + shift), advantages, atol=1e-9)
    if kind != "std":
        advantages = advantages * scale
    # The std's eps of 1e-4 is small beside the least spread here, 1/8 of .25 in a group of 16.
    np.testing.assert_allclose(ADVANTAGES[kind](rewards * scale), advantages, rtol=0.05)


@given(st.sampled_from(sorted(ADVANTAGES)), st.lists(st.floats(0, 1), min_size=2, max_size=16))
def test_a_better_answer_has_no_smaller_advantage(kind, rewards):
    order = np.argsort(rewards, kind="stable")
    assert (np.diff(ADVANTAGES[kind](np.array(rewards))[order]) >= 0).all()


def test_zero_advantage_is_equality_of_the_extremes():
    equal = [0.1] * 6
    assert np.std(equal) != 0
    assert is_zero_advantage(equal)
    assert is_zero_advantage([1.0, 1.0])
    assert not is_zero_advantage([0.1, 0.1, 0.1 + 1e-12])


def rollout(index, prompt, completion, versions):
    spans = tuple(VersionSpan(i, i + 1, PolicyVersion(1, step)) for i, step in enumerate(versions))
    return Rollout(
        rollout_id=f"r{index}",
        draw_id="d",
        prompt_token_ids=prompt,
        completion_token_ids=completion,
        rollout_logprobs=tuple(-0.5 - index - i for i in range(len(completion))),
        text="",
        finish_reason="stop",
        version_spans=spans,
    )


def reward(value):
    if value is None:
        return Reward(value=None, correctness=None, outcome=Outcome.INFRASTRUCTURE)
    return Reward(value=value, correctness=float(value > 0.5), outcome=Outcome.CORRECT)


def group(values):
    prompt = Prompt(
        prompt_id="p", messages=(Message(role="user", content="?"),), reference="", domain="maths"
    )
    return RolloutGroup(
        draw_id="d",
        prompt=prompt,
        system=None,
        sampling=Sampling(max_tokens=8),
        rollouts=tuple(
            rollout(i, (7, 8, 9), tuple(range(20, 20 + i + 1)), [4, 3, 5, 6][: i + 1])
            for i in range(len(values))
        ),
        rewards=tuple(reward(value) for value in values),
    )


def test_arrays_stand_at_the_tokens_own_index():
    samples = group_to_samples(group([1.0, 0.0]), "mean")
    second = samples[1]
    assert second.token_ids.tolist() == [7, 8, 9, 20, 21]
    assert second.loss_mask.tolist() == [0, 0, 0, 1, 1]
    assert second.rollout_logprobs.tolist() == [0, 0, 0, -1.5, -2.5]
    assert second.advantages.tolist() == [0, 0, 0, -0.5, -0.5]
    assert [sample.oldest_version.step for sample in samples] == [4, 3]


def test_unscored_rollouts_leave_the_baseline_and_are_not_trained():
    samples = group_to_samples(group([1.0, None, 0.0, 0.0]), "leave_one_out")
    assert [len(sample.token_ids) for sample in samples] == [4, 6, 7]
    np.testing.assert_allclose([s.advantages[-1] for s in samples], [1.0, -0.5, -0.5], rtol=1e-6)


def test_advantages_read_the_shaped_value_not_correctness():
    samples = group_to_samples(group([0.8, 0.6]), "mean")
    np.testing.assert_allclose([s.advantages[-1] for s in samples], [0.1, -0.1], rtol=1e-6)


def test_a_group_without_a_baseline_is_refused_by_name():
    with pytest.raises(ValueError, match="draw d has 1 scored"):
        group_to_samples(group([1.0, None]), "mean")
