"""What the roles beside the learner are measured by."""

from types import SimpleNamespace

import pytest

from posttrain.stages import rl_roles
from posttrain.stages.rl_roles import Role, RoleTimes


def test_speeds_and_shares_are_of_the_time_since_the_last_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(now=50.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(rl_roles, "time", clock)
    shares, tokens = iter([0.9, 0.25, 0.5]), iter([100, 160, 160])
    times = RoleTimes(
        {
            "rollout": Role(idle_share=lambda: next(shares)),
            "judge": Role(tokens=lambda: next(tokens)),
        }
    )
    clock.now += 4
    assert times.metrics() == {"rollout_idle_share": 0.25, "judge_tokens_per_s": 15.0}
    clock.now += 4
    assert times.metrics() == {"rollout_idle_share": 0.5, "judge_tokens_per_s": 0.0}
