"""One line about a step, for whoever watches."""

from __future__ import annotations

from collections.abc import Mapping


def status(metrics: Mapping[str, float]) -> str:
    """From a step's metrics (see `posttrain.online.metrics`); what was not measured is left out.

    >>> status({"pass@1": 0.5, "signal_share": 0.75, "lag_mean": 0.9, "lag_max": 2})
    'pass@1 .50 · signal 75% · lag 0.9 (max 2)'
    """
    parts = [
        f"{label} {_rate(metrics[name])}"
        for name, label in (("reward_mean", "reward"), ("pass@1", "pass@1"))
        if name in metrics
    ]
    if "signal_share" in metrics:
        parts.append(f"signal {metrics['signal_share']:.0%}")
    if "lag_mean" in metrics:
        parts.append(f"lag {metrics['lag_mean']:.1f} (max {metrics['lag_max']:.0f})")
    if "trained_tokens_per_s" in metrics:
        parts.append(f"{metrics['trained_tokens_per_s']:,.0f} tok/s")
    idle = [
        f"{role} {metrics[f'{role}_idle_share']:.0%}"
        for role in ("learner", "rollout", "judge", "teacher")
        if f"{role}_idle_share" in metrics
    ]
    if idle:
        parts.append(f"idle: {', '.join(idle)}")
    return " · ".join(parts)


def _rate(value: float) -> str:
    return f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.2f}"
