"""Which SFT checkpoint is kept: the most accurate of those that can still find as much."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.stages.checkpoint_choice import Measured, choose
from posttrain.stages.trl_rank import save_steps

ENTERED = Measured(accuracy=0.4, reach=0.8)


def table(**saved: tuple[float, float]) -> dict[int, Measured]:
    return {int(k[1:]): Measured(accuracy=a, reach=r) for k, (a, r) in saved.items()}


@pytest.mark.parametrize(
    ("saved", "step", "over"),
    [
        (table(s10=(0.45, 0.80), s20=(0.50, 0.79)), 20, []),
        # More accurate, and at the price of what is found among eight tries.
        (table(s10=(0.45, 0.80), s20=(0.60, 0.70)), 10, [20]),
        # A fall within the margin is no fall.
        (table(s10=(0.45, 0.80), s20=(0.60, 0.775)), 20, []),
        # All have fallen: the one that fell least, not the one that looks best.
        (table(s10=(0.45, 0.75), s20=(0.60, 0.60)), 10, [10, 20]),
        # Of equals the one that was trained least.
        (table(s10=(0.50, 0.80), s20=(0.50, 0.85)), 10, []),
    ],
)
def test_accuracy_counts_only_where_reach_is_left(
    saved: dict[int, Measured], step: int, over: list[int]
) -> None:
    choice = choose(ENTERED, saved, max_fall=0.03)
    assert choice.step == step
    assert choice.over_constrained == over


@given(st.integers(1, 12), st.integers(1, 5000))
def test_policies_are_saved_at_even_distances_and_at_the_end(count: int, max_steps: int) -> None:
    steps = sorted(save_steps(count, max_steps))
    assert steps[-1] == max_steps
    assert len(steps) == min(count, max_steps)
    assert steps[0] >= 1
    distances = {b - a for a, b in zip([0, *steps], steps, strict=False)}
    assert max(distances) - min(distances) <= 1
