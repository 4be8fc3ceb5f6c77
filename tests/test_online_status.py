"""The line that whoever watches a run sees."""

from __future__ import annotations

from posttrain.online.status import status

FULL = {
    "reward_mean": 0.716,
    "pass@1": 0.583,
    "zero_advantage_share": 0.17,
    "signal_share": 0.73,  # a tenth was not scored
    "lag_mean": 0.94,
    "lag_max": 1,
    "trained_tokens_per_s": 1234.5,
    "learner_idle_share": 0.12,
    "rollout_idle_share": 0.0,
}


def test_a_step_in_one_line_that_fits_a_terminal_with_its_step_and_the_time_left() -> None:
    line = status(FULL)
    assert line == (
        "reward .72 · pass@1 .58 · signal 73% · lag 0.9 (max 1) · 1,234 tok/s"
        " · idle: learner 12%, rollout 0%"
    )
    assert len(f"rl 100/1000 · {line} · 1:02:03 left") <= 130


def test_what_was_not_measured_is_left_out() -> None:
    assert status({}) == ""
    without = {k: v for k, v in FULL.items() if k not in ("pass@1", "rollout_idle_share")}
    assert "pass@1" not in status(without)
    assert status(without).endswith("idle: learner 12%")


def test_rewards_may_be_negative_or_large() -> None:
    assert status({"reward_mean": -0.25}) == "reward -.25"
    assert status({"reward_mean": 10.0}) == "reward 10.00"
