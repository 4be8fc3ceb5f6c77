"""Whether a scored group carries a learning signal."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from posttrain.advantages import is_zero_advantage
from posttrain.types import DrawOutcome, RolloutGroup


class Reason(StrEnum):
    """Why a draw ended without being trained."""

    ALL_CORRECT = "all_correct"
    NONE_CORRECT = "none_correct"
    UNSCORED = "unscored"
    DEADLINE = "deadline"
    NOT_FINITE = "not_finite"
    """The learner skipped its batch: the loss or a gradient was no finite number."""
    STAGE_ENDED = "stage_ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The gate's answer for a group that is not worth a step."""

    outcome: DrawOutcome
    reason: Reason


def classify(group: RolloutGroup, *, needs_contrast: bool = True) -> Ended | None:
    """None for a trainable group, otherwise how its draw ends. Without `needs_contrast` (a teacher
    says what to learn, no reward does) equal scores are no reason to end.

    Reads raw correctness alone: length and format terms differ within almost every group and
    would let through prompts from which nothing about correctness can be learnt. Equality is
    tested by max == min; a standard deviation of 0 fails in floating point.
    """
    if group.num_scored < 2:
        return Ended(outcome=DrawOutcome.ERRORED, reason=Reason.UNSCORED)
    scores = [r.correctness for r in group.rewards if r.correctness is not None]
    if needs_contrast and is_zero_advantage(scores):
        all_correct = group.num_correct == group.num_scored
        reason = Reason.ALL_CORRECT if all_correct else Reason.NONE_CORRECT
        return Ended(outcome=DrawOutcome.ZERO_ADVANTAGE, reason=reason)
    return None
