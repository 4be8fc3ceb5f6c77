"""What comes out of the loop when a part of it fails, and what it leaves behind."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from online_fakes import (
    CountingCurriculum,
    DirectPublisher,
    MemoryLedger,
    ScriptedGenerator,
    TextScorer,
    TimedLearner,
    World,
    loop_settings,
    run_virtual,
)

from posttrain.errors import EngineError
from posttrain.types import (
    DrawOutcome,
    GenerationRequest,
    PolicyVersion,
    Rollout,
)


class PartError(Exception):
    """What a part of the loop raises in these tests."""


class Failing:
    """Raises on the n-th call of any of the loop's Protocols, after a moment of work."""

    def __init__(self, inner: Any, method: str, after: int) -> None:
        self._inner, self._method, self._after = inner, method, after
        self.num_calls = 0

    def __getattr__(self, name: str) -> Any:
        inner = getattr(self._inner, name)
        if name != self._method:
            return inner
        if asyncio.iscoroutinefunction(inner):
            return self._later
        return self._now

    def _fail_in_time(self) -> None:
        self.num_calls += 1
        if self.num_calls == self._after:
            try:
                raise KeyError("the root")
            except KeyError as cause:
                raise PartError(f"{self._method} failed") from cause

    def _now(self, *args: Any, **kwargs: Any) -> Any:
        self._fail_in_time()
        return getattr(self._inner, self._method)(*args, **kwargs)

    async def _later(self, *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0.125)
        self._fail_in_time()
        return await getattr(self._inner, self._method)(*args, **kwargs)


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize(
    "method",
    ["generate", "score", "step", "publish", "draw", "observe", "open_draw", "close_draw", "flush"],
)
def test_a_crash_of_any_part_comes_out_as_it_is(method: str, after: int) -> None:
    generator = ScriptedGenerator(marks=lambda n: "10")
    parts: dict[str, Any] = {
        "curriculum": CountingCurriculum(),
        "scorer": TextScorer(),
        "learner": TimedLearner(),
        "publisher": DirectPublisher(generator),
        "ledger": MemoryLedger(),
    }
    wrapped = {k: Failing(p, method, after) if hasattr(p, method) else p for k, p in parts.items()}
    engine: Any = Failing(generator, method, after) if method == "generate" else generator
    world = World(loop_settings(num_steps=9), engine, **wrapped)
    with pytest.raises(PartError, match=f"{method} failed") as raised:
        world.run()
    assert isinstance(raised.value.__cause__, KeyError)
    ledger: MemoryLedger = parts["ledger"]
    assert len(ledger.closed) <= len(ledger.opened)
    assert not ledger.ids(DrawOutcome.UNUSED)


@pytest.mark.parametrize("hook", ["on_step", "on_group", "encode", "draw_system"])
def test_a_crash_of_a_hook_comes_out_as_it_is(hook: str) -> None:
    def fail(*args: Any) -> Any:
        raise PartError(hook)

    async def fail_later(record: Any) -> None:
        fail()

    world = World(
        loop_settings(),
        ScriptedGenerator(marks=lambda n: "10"),
        **({"on_step": fail_later} if hook == "on_step" else {}),
        **({hook: fail} if hook in ("encode", "draw_system") else {}),
    )
    if hook == "on_group":
        world.controller._accounting._on_group = fail
    with pytest.raises(PartError, match=hook):
        world.run()


def test_a_timeout_of_the_generator_itself_is_a_crash_not_a_stale_draw() -> None:
    class TimingOut(ScriptedGenerator):
        async def generate(self, request: GenerationRequest) -> tuple[Rollout, ...]:
            raise TimeoutError("the engine did not answer")

    world = World(loop_settings(), TimingOut(marks=lambda n: "10"))
    with pytest.raises(TimeoutError, match="the engine did not answer"):
        world.run()
    assert world.ledger.closed == {}


def test_a_cancelled_run_leaves_its_draws_open_for_the_next_attempt() -> None:
    world = World(loop_settings(), ScriptedGenerator(marks=lambda n: "10"))

    async def interrupted() -> None:
        task = asyncio.create_task(world.controller.run())
        await asyncio.sleep(1.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run_virtual(interrupted())
    assert len(world.ledger.opened) == 4
    assert world.ledger.closed == {}


@pytest.mark.parametrize(
    ("served", "complaint"),
    [(PolicyVersion(1, 2), "written by version 1.2"), (PolicyVersion(0, 9), "version 0.9")],
)
def test_a_generator_with_replaced_weights_is_found_out(
    served: PolicyVersion, complaint: str
) -> None:
    """As an engine that was restarted: it serves what it was started with."""

    class Restarted(ScriptedGenerator):
        async def generate(self, request: GenerationRequest) -> tuple[Rollout, ...]:
            if self.served and self.served.step >= 4:
                self.served = served
            return await super().generate(request)

    world = World(loop_settings(num_steps=20, max_lag=1), Restarted(marks=lambda n: "10"))
    with pytest.raises(EngineError, match=complaint) as raised:
        world.run()
    assert "the lag bound is 1" in str(raised.value)
