"""How long nothing was being answered, on a clock that jumps."""

from __future__ import annotations

import asyncio

import pytest
from online_fakes import (
    CountingCurriculum,
    ScriptedGenerator,
    TimedLearner,
    World,
    loop_settings,
    run_virtual,
)

from posttrain.online.playing import Playing


def test_idle_seconds_are_those_without_a_task() -> None:
    async def main() -> list[float]:
        taken = []
        async with asyncio.TaskGroup() as group:
            playing = Playing(group)
            await asyncio.sleep(5)
            taken.append(playing.take_idle_s())  # nothing was ever started
            playing.start(asyncio.sleep(2))
            playing.start(asyncio.sleep(3))
            assert len(list(playing)) == 2
            await asyncio.sleep(4)  # the last 1 s of it idle
            taken.append(playing.take_idle_s())
            await asyncio.sleep(10)
            playing.start(asyncio.sleep(1))
            await asyncio.sleep(3)  # 10 s before it, 2 s after it
            taken.append(playing.take_idle_s())
        return taken

    assert run_virtual(main()) == pytest.approx([0.0, 1.0, 12.0])


def test_a_slow_learner_leaves_the_rollouts_idle_and_slow_rollouts_the_learner() -> None:
    """With lag 1 two batches are in flight, so two steps make a period."""

    def idle_shares(generating: float, learning: float) -> tuple[float, float]:
        world = World(
            loop_settings(num_steps=8),
            ScriptedGenerator(marks=lambda n: "10", seconds=lambda n: generating),
            learner=TimedLearner(seconds=lambda step: learning),
            curriculum=CountingCurriculum(),
        )
        world.run()
        period = [record.metrics for record in world.records[4:6]]
        seconds = sum(metrics["step_s"] for metrics in period)
        learner, rollout = (
            sum(metrics[f"{role}_idle_share"] * metrics["step_s"] for metrics in period)
            for role in ("learner", "rollout")
        )
        return learner / seconds, rollout / seconds

    assert idle_shares(generating=1.0, learning=4.0) == pytest.approx((0.0, 0.75))
    # Two batches are there after 4 s; the second is trained while the first is drawn anew.
    assert idle_shares(generating=4.0, learning=1.0) == pytest.approx((3 / 5, 0.0))
