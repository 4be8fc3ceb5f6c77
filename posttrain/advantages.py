"""From the rewards of a group to advantages, and from a scored group to training samples.

Every function reads the *scored* rewards of one group, `[G]` with G ≥ 2, and returns `[G]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from posttrain.types import Rollout, RolloutGroup, TrainingSample

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from posttrain.types import FloatArray

    Rewards = NDArray[np.float64]

AdvantageKind = Literal["mean", "std", "leave_one_out"]


def mean_centred(rewards: Rewards) -> Rewards:
    """A = R − μ (Dr.GRPO, Liu et al. 2025): the size of a reward difference keeps its meaning."""
    return np.subtract(rewards, np.mean(rewards))


def bessel_std(rewards: Rewards, eps: float = 1e-4) -> Rewards:
    """A = (R − μ)/(σ + eps), σ with Bessel's correction (GRPO, Shao et al. 2024)."""
    return mean_centred(rewards) / (np.std(rewards, ddof=1) + eps)


def leave_one_out(rewards: Rewards) -> Rewards:
    """A_i = R_i − mean of the others = (R_i − μ)·G/(G−1) (RLOO, Ahmadian et al. 2024)."""
    return mean_centred(rewards) * len(rewards) / (len(rewards) - 1)


ADVANTAGES: Mapping[AdvantageKind, Callable[[Rewards], Rewards]] = {
    "mean": mean_centred,
    "std": bessel_std,
    "leave_one_out": leave_one_out,
}


def is_zero_advantage(correctness: Sequence[float]) -> bool:
    """True if the raw verifier scores of a group are all equal, so that it carries no signal.

    Compares the extremes, because a standard deviation of equal floats need not be 0.
    """
    return max(correctness) == min(correctness)


def group_to_samples(
    group: RolloutGroup,
    kind: AdvantageKind,
    *,
    reward_weight: float = 1.0,
    teacher_logprobs: Sequence[FloatArray] | None = None,
) -> list[TrainingSample]:
    """One sample per scored rollout, in the group's order; unscored ones leave the baseline too.

    `reward_weight` multiplies the advantages. `teacher_logprobs` are those of each rollout's
    completion tokens, `[C]`; None where there are none.

    Raises ValueError for a group with fewer than two scored rollouts: it has no baseline.
    """
    heard = teacher_logprobs if teacher_logprobs is not None else [None] * len(group.rollouts)
    scored = [
        (rollout, reward.value, logprobs)
        for rollout, reward, logprobs in zip(group.rollouts, group.rewards, heard, strict=True)
        if reward.value is not None
    ]
    if len(scored) < 2:
        raise ValueError(
            f"draw {group.draw_id} has {len(scored)} scored rollouts; an advantage needs two: "
            "end such a draw at the gate"
        )
    advantages = ADVANTAGES[kind](np.array([value for _, value, _ in scored], dtype=np.float64))
    return [
        _to_sample(rollout, reward_weight * float(advantage), logprobs)
        for (rollout, _, logprobs), advantage in zip(scored, advantages, strict=True)
    ]


def _to_sample(
    rollout: Rollout, advantage: float, teacher_logprobs: FloatArray | None
) -> TrainingSample:
    prompt_length = len(rollout.prompt_token_ids)
    token_ids = np.array(rollout.prompt_token_ids + rollout.completion_token_ids, dtype=np.int64)
    loss_mask = np.zeros(len(token_ids), dtype=np.float32)
    loss_mask[prompt_length:] = 1.0
    rollout_logprobs = np.zeros(len(token_ids), dtype=np.float32)
    rollout_logprobs[prompt_length:] = rollout.rollout_logprobs
    of_teacher = None
    if teacher_logprobs is not None:
        of_teacher = np.full(len(token_ids), np.nan, dtype=np.float32)
        of_teacher[prompt_length:] = teacher_logprobs
    return TrainingSample(
        token_ids=token_ids,
        loss_mask=loss_mask,
        rollout_logprobs=rollout_logprobs,
        advantages=loss_mask * np.float32(advantage),
        oldest_version=rollout.oldest_version,
        teacher_logprobs=of_teacher,
    )
