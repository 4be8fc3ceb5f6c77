"""A signal during RL: the last whole step is saved, at once where no step is under way."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from typing import Any

import pytest

from posttrain.errors import Interrupted
from posttrain.online.metrics import StepRecord
from posttrain.stages.rl_stop import StopWithCheckpoint
from posttrain.types import PolicyVersion, TrainingBatch

BATCH: Any = None


class Bench:
    """A learner whose step ends when a test says so, and what was saved when."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.learner_done = asyncio.Event()
        self.stop = StopWithCheckpoint(self, self.on_step, self.save)
        self.steps = 0

    async def step(self, batch: TrainingBatch) -> Mapping[str, float]:
        self.events.append("step begins")
        await self.learner_done.wait()
        self.learner_done.clear()
        return {}

    async def on_step(self, record: StepRecord) -> None:
        self.steps = record.step
        self.events.append(f"step {record.step} on record")

    async def save(self) -> int | None:
        self.events.append(f"saved {self.steps}")
        return self.steps or None

    async def train(self) -> None:
        """As the loop does: wait for groups, step, record."""
        for step in range(1, 100):
            await asyncio.sleep(0.01)
            await self.stop.step(BATCH)
            await asyncio.sleep(0.01)  # publishing
            version = PolicyVersion(1, step)
            await self.stop.after_step(
                StepRecord(
                    step=step, version=version, num_draws=0, plans=[], learned=[], metrics={}
                )
            )

    async def ends(self) -> str:
        with pytest.raises(ExceptionGroup) as group:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.train())
                tasks.create_task(self.stop.run())
        (error,) = group.value.exceptions
        assert isinstance(error, Interrupted)
        return str(error)

    async def until(self, event: str) -> None:
        while event not in self.events:
            await asyncio.sleep(0.001)


def ask(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_step_under_way_is_finished_and_saved(number: signal.Signals) -> None:
    bench = Bench()
    with pytest.raises(Interrupted), bench.stop.listening():
        ending = asyncio.create_task(bench.ends())
        await bench.until("step begins")
        ask(number)
        await asyncio.sleep(0.05)
        assert bench.events == ["step begins"]  # nothing is saved of half a step
        bench.learner_done.set()
        said = await asyncio.wait_for(ending, 5)
    assert bench.events == ["step begins", "step 1 on record", "saved 1"]
    assert said == (
        f"rl stopped by {number.name} with a checkpoint of step 1; the same command goes on"
    )


async def test_between_steps_nothing_is_waited_for() -> None:
    bench = Bench()
    bench.learner_done.set()
    with pytest.raises(Interrupted), bench.stop.listening():
        ending = asyncio.create_task(bench.ends())
        await bench.until("step 1 on record")
        ask()
        await asyncio.wait_for(ending, 5)
    assert bench.events == ["step begins", "step 1 on record", "saved 1"]


async def test_before_the_first_step_there_is_nothing_to_save() -> None:
    bench = Bench()
    with pytest.raises(Interrupted), bench.stop.listening():
        ending = asyncio.create_task(bench.ends())
        await asyncio.sleep(0)
        ask()
        assert "before its first step" in await asyncio.wait_for(ending, 5)
    assert "step begins" not in bench.events


async def test_a_stage_that_is_just_ending_goes_no_further() -> None:
    bench = Bench()
    with (
        pytest.raises(Interrupted, match="rl stopped by SIGINT after its last step"),
        bench.stop.listening(),
    ):
        ask(signal.SIGINT)
    with Bench().stop.listening():
        pass  # without a signal nothing is raised


async def test_the_second_signal_has_its_usual_effect() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        bench = Bench()
        with pytest.raises(Interrupted), bench.stop.listening():
            ending = asyncio.create_task(bench.ends())
            await bench.until("step begins")
            ask()
            await asyncio.sleep(0.01)
            assert seen == []
            ask()
            await asyncio.sleep(0.01)
            assert seen == [signal.SIGTERM]
            bench.learner_done.set()
            await asyncio.wait_for(ending, 5)
        ask()
        assert len(seen) == 2  # the handler is back
    finally:
        signal.signal(signal.SIGTERM, before)
