"""A better split of a run's devices between generation and learning, from what it measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from posttrain.errors import DataError

WARM_UP = 0.2
"""The share of steps at the beginning that says nothing of the steady state."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Means over the steps of an RL stage, in seconds a step: the whole, what the learner worked,
    what the engines had something to do, publishing; and the idle shares that this comes from."""

    step: float
    learning: float
    generating: float
    publishing: float
    learner_idle: float
    engines_idle: float


@dataclass(frozen=True, kw_only=True)
class Split:
    """Devices of each pool, and the seconds that a step is expected to take."""

    engines: int
    learners: int
    step: float


def measure(records: Sequence[Mapping[str, Any]]) -> Measured:
    """From the records of a run's metrics.jsonl.

    Raises:
        DataError: it has no RL steps, or too few.
    """
    by_step: dict[int, Mapping[str, Any]] = {}
    for record in records:
        if record.get("stage") == "rl" and "rollout_idle_share" in record:
            by_step[record["step"]] = record
    steps = [by_step[step] for step in sorted(by_step)]
    steady = steps[int(len(steps) * WARM_UP) :]
    if len(steps) < 4:
        raise DataError(
            f"--from: {len(steps)} steps of RL with idle shares are too few to go by; run 4 or more"
        )

    def mean(of: str) -> float:
        return fmean(record[of] for record in steady)

    return Measured(
        step=mean("step_s"),
        learning=fmean(r["learner_busy_share"] * r["step_s"] for r in steady),
        generating=fmean((1 - r["rollout_idle_share"]) * r["step_s"] for r in steady),
        publishing=mean("publish_s"),
        learner_idle=mean("learner_idle_share"),
        engines_idle=mean("rollout_idle_share"),
    )


def best_split(
    measured: Measured,
    *,
    engines: int,
    learners: int,
    engine_unit: int,
    learner_unit: int,
    max_lag: int,
    fits: Callable[[int], bool],
) -> Split:
    """The split of `engines + learners` devices under which a step is shortest, if both kinds of
    work go faster in proportion to their devices and overlap unless `max_lag` is 0.

    Args:
        engine_unit: devices that one engine takes.
        learner_unit: devices that one rank takes.
        fits: whether so many devices hold the learner.
    """

    def step(engines_now: int, learners_now: int) -> float:
        generating = measured.generating * engines / engines_now
        learning = measured.learning * learners / learners_now
        together = max(generating, learning) if max_lag else generating + learning
        return together + measured.publishing

    total = engines + learners
    others = [
        (e, total - e)
        for e in range(engine_unit, total, engine_unit)
        if (total - e) % learner_unit == 0 and (total - e == learners or fits(total - e))
    ]
    splits = [Split(engines=e, learners=n, step=step(e, n)) for e, n in others]
    # Of equals the one that changes least.
    return min(splits, key=lambda s: (round(s.step, 9), abs(s.engines - engines)))
