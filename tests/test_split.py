"""A better split of devices, from idle shares: by hand-computed rates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import DataError
from posttrain.split import Measured, Split, best_split, measure


def record(step: int, **changes: float) -> dict[str, object]:
    shares = {"learner_busy_share": 0.25, "learner_idle_share": 0.5, "rollout_idle_share": 0.0}
    return {"stage": "rl", "step": step, "step_s": 8.0, "publish_s": 1.0} | shares | changes


def measured(generating: float, learning: float, publishing: float = 0.0) -> Measured:
    return Measured(
        step=max(generating, learning) + publishing,
        learning=learning,
        generating=generating,
        publishing=publishing,
        learner_idle=0.0,
        engines_idle=0.0,
    )


def split(found: Measured, engines: int, learners: int, **limits: object) -> Split:
    asked = {"engine_unit": 1, "learner_unit": 1, "max_lag": 1, "fits": lambda _: True}
    return best_split(found, engines=engines, learners=learners, **{**asked, **limits})  # type: ignore[arg-type]


def test_shares_become_seconds_after_the_warm_up() -> None:
    slow_start = [record(1, step_s=100.0), record(2, step_s=100.0)]
    steady = [record(step) for step in range(3, 11)]
    others = [{"stage": "rl", "event": "evaluation", "step": 3}, {"stage": "sft", "event": "done"}]
    found = measure([*slow_start, *others, *steady])
    assert found == Measured(
        step=8.0, learning=2.0, generating=8.0, publishing=1.0, learner_idle=0.5, engines_idle=0.0
    )


def test_a_step_that_was_repeated_counts_as_it_was_last() -> None:
    again = [record(step, rollout_idle_share=0.5) for step in range(1, 6)]
    assert measure([record(step) for step in range(1, 6)] + again).generating == 4.0


def test_too_few_steps_say_nothing() -> None:
    with pytest.raises(DataError, match="3 steps of RL with idle shares are too few"):
        measure([record(1), record(2), record(3), {"stage": "rl", "step": 4}])


def test_devices_go_where_the_work_is() -> None:
    # 4 + 4 devices, 8 s against 2 s: 6 engines need 8·4/6 = 5.33 s, 2 ranks 2·4/2 = 4 s.
    assert split(measured(8, 2), 4, 4) == Split(engines=6, learners=2, step=pytest.approx(16 / 3))
    assert split(measured(2, 8), 4, 4) == Split(engines=2, learners=6, step=pytest.approx(16 / 3))
    assert split(measured(8, 2, publishing=1), 4, 4).step == pytest.approx(16 / 3 + 1)


def test_what_is_balanced_stays() -> None:
    assert split(measured(5, 5), 4, 4) == Split(engines=4, learners=4, step=5)
    assert split(measured(9, 1), 1, 1) == Split(engines=1, learners=1, step=9)


def test_units_and_memory_bound_what_is_proposed() -> None:
    assert split(measured(8, 2), 4, 4, engine_unit=4) == Split(engines=4, learners=4, step=8)
    assert split(measured(8, 2), 4, 4, fits=lambda ranks: ranks >= 3).learners == 3
    # The learner fits as it is: it ran.
    assert split(measured(8, 2), 4, 4, fits=lambda ranks: False).learners == 4
    assert split(measured(8, 2), 4, 4, learner_unit=4).learners == 4


def test_in_lock_step_the_two_add_up() -> None:
    # 8·4/e + 2·4/l with e + l = 8 is least at e : l = 2 : 1, of whole devices at 5 and 3.
    found = split(measured(8, 2), 4, 4, max_lag=0)
    assert (found.engines, found.learners) == (5, 3)
    assert found.step == pytest.approx(32 / 5 + 8 / 3)


@given(st.floats(0.1, 100), st.floats(0.1, 100), st.integers(1, 12), st.integers(1, 12))
def test_a_proposal_uses_the_same_devices_and_is_never_slower(
    generating: float, learning: float, engines: int, learners: int
) -> None:
    found = split(measured(generating, learning), engines, learners)
    assert found.engines + found.learners == engines + learners
    assert min(found.engines, found.learners) >= 1
    assert found.step <= max(generating, learning) * (1 + 1e-9)
