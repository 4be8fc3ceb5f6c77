"""How far a group's oldest token lies behind the weights that it trains."""

from __future__ import annotations

from posttrain.errors import EngineError
from posttrain.types import PolicyVersion, RolloutGroup


def lag_of(group: RolloutGroup, current: PolicyVersion) -> int:
    """Optimizer steps between the weights being trained and those of the group's oldest token."""
    return current.step - group.oldest_version.step


def checked_lag(group: RolloutGroup, current: PolicyVersion, bound: int) -> int:
    """`lag_of`. Raises EngineError for a lag that admission rules out."""
    oldest, lag = group.oldest_version, lag_of(group, current)
    if oldest.attempt != current.attempt or not 0 <= lag <= bound:
        raise EngineError(
            f"draw {group.draw_id} was written by version {oldest}, but the learner is at "
            f"{current} and the lag bound is {bound}: a generator served weights that had been "
            "replaced; restart it and publish again"
        )
    return lag
