"""Re-screening beside training: when a critic of its own gets new weights, and when not."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from curricula.sampler import DifficultySampler
from posttrain.config import RLSettings
from posttrain.online.rescreen import RescreenReport, RescreenSettings
from posttrain.stages import rl_beside
from posttrain.stages.rl_beside import Beside
from posttrain.types import PolicyVersion

REPORT = RescreenReport(prompts=1, samples=1, discarded=0, dropped=0, restored=0, labels={})


class Slices:
    """In place of the re-screener: a slice takes until the test lets it end."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.begun: list[int] = []
        self.may_end = asyncio.Event()

    async def slice(self, step: int) -> RescreenReport:
        self.begun.append(step)
        await self.may_end.wait()
        self.may_end.clear()
        return REPORT


class Publisher:
    def __init__(self) -> None:
        self.published: list[int] = []

    async def publish(self, version: PolicyVersion) -> dict[str, float]:
        self.published.append(version.step)
        return {}


def beside(monkeypatch: pytest.MonkeyPatch, publisher: Publisher | None) -> Any:
    monkeypatch.setattr(rl_beside, "Rescreener", Slices)
    settings = RLSettings(max_lag=2, rescreen=RescreenSettings(every_steps=10))
    context: Any = SimpleNamespace(
        settings=SimpleNamespace(rl=settings),
        pools=SimpleNamespace(scorer=None),
        chat=SimpleNamespace(encode=None, template_hash=""),
        ledger=None,
        seed=0,
        metrics=SimpleNamespace(append=lambda _: None),
    )
    critic: Any = None if publisher is None else object()
    curriculum = object.__new__(DifficultySampler)
    engines: Any = object()
    to_critic: Any = publisher
    return Beside(context, 1, engines, curriculum, critic, to_critic)


async def train(beside: Any, steps: range) -> None:
    for step in steps:
        await beside.reached(PolicyVersion(1, step))
        for _ in range(5):
            await asyncio.sleep(0)


async def test_a_critic_of_its_own_stands_still_while_it_judges(monkeypatch):
    publisher = Publisher()
    beside_ = beside(monkeypatch, publisher)
    slices = beside_._rescreener
    (loop,) = beside_.loops
    running = asyncio.create_task(loop())
    await train(beside_, range(1, 25))
    assert (publisher.published, slices.begun) == ([10], [10])
    slices.may_end.set()
    await train(beside_, range(25, 31))
    assert (publisher.published, slices.begun) == ([10, 30], [10, 30])
    running.cancel()


async def test_one_that_has_not_begun_to_judge_stands_still_too(monkeypatch):
    """The loop need not have had its turn before the next step is due."""
    publisher = Publisher()
    beside_ = beside(monkeypatch, publisher)
    await train(beside_, range(1, 21))
    assert publisher.published == [10]


async def test_shared_engines_judge_the_last_step_that_came_due_next(monkeypatch):
    """Their weights go on changing anyway."""
    beside_ = beside(monkeypatch, None)
    slices = beside_._rescreener
    (loop,) = beside_.loops
    running = asyncio.create_task(loop())
    await train(beside_, range(1, 35))
    assert slices.begun == [10]
    slices.may_end.set()
    await train(beside_, range(35, 36))
    assert slices.begun == [10, 30]
    running.cancel()
