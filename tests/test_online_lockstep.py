"""Lock-step runs repeat themselves, whatever the timing, and over a crash too."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from online_fakes import (
    ScriptedGenerator,
    TimedLearner,
    World,
    loop_settings,
    make_prompt,
    make_rollout,
    run_virtual,
)

from curricula.sampler import CurriculumSettings, build_curriculum
from posttrain.types import GenerationRequest, Rollout

NUM_STEPS = 10
PROMPTS = [make_prompt(i, domain="even" if i % 2 == 0 else "odd") for i in range(60)]


class Killed(Exception):
    """Stands for the end of the process."""


class SeededGenerator(ScriptedGenerator):
    """Answers are a function of the request's seed; how long they take is not."""

    def __init__(self, timing: int) -> None:
        delays = random.Random(timing)
        super().__init__(marks=lambda n: "", seconds=lambda n: delays.uniform(0.1, 9.0))

    async def generate(self, request: GenerationRequest) -> tuple[Rollout, ...]:
        self.requests.append(request)
        version = self.served
        assert version is not None
        await asyncio.sleep(self.seconds(len(self.requests)))
        choice = random.Random(request.sampling.seed)
        return tuple(
            make_rollout(request.request_id, i, choice.choice("01"), version)
            for i in range(request.num_rollouts)
        )


def curriculum() -> Any:
    return build_curriculum(PROMPTS, [], CurriculumSettings(cooldown=4), 2, seed=3, batch_size=2)


def history(world: World) -> list[tuple[int, str, str]]:
    """(number, prompt, outcome) of every draw that ended, in the order of admission."""
    return [
        (
            int(draw_id.partition("-")[2]),
            world.ledger.opened[draw_id]["prompt_id"],
            world.ledger.closed[draw_id]["outcome"].value,
        )
        for draw_id in world.ledger.opened
        if draw_id in world.ledger.closed
    ]


def play(timing: int, *, max_lag: int = 0, seed: int = 5) -> World:
    world = World(
        loop_settings(num_steps=NUM_STEPS, max_lag=max_lag),
        SeededGenerator(timing),
        curriculum=curriculum(),
        learner=TimedLearner(seconds=lambda step: 0.3),
        seed=seed,
    )
    world.run()
    return world


def test_timing_changes_nothing_in_lock_step() -> None:
    first, second = play(timing=1), play(timing=2)
    assert len(history(first)) > NUM_STEPS * 2  # some draws ended without a signal
    assert history(first) == history(second)
    states = [world.curriculum.state_dict() for world in (first, second)]
    assert states[0].keys() == states[1].keys()
    assert all((states[0][k] == states[1][k]).all() for k in states[0])


def test_without_lock_step_time_decides_and_samples_have_no_seed() -> None:
    first, second = play(timing=1, max_lag=1), play(timing=2, max_lag=1)
    assert all(request.sampling.seed is None for request in first.generator.requests)
    assert history(first) != history(second)


def test_each_draw_has_a_seed_of_its_own_that_the_run_s_seed_decides() -> None:
    seeds = [r.sampling.seed for r in play(timing=1).generator.requests]
    assert len(set(seeds)) == len(seeds)
    assert all(seed is not None and 0 <= seed < 2**62 for seed in seeds)
    again = [r.sampling.seed for r in play(timing=1, seed=6).generator.requests]
    assert not set(seeds) & set(again)


@pytest.mark.parametrize("kill_at", [1, 4, 9])
def test_a_run_that_is_killed_and_resumed_equals_the_undisturbed_one(kill_at: int) -> None:
    undisturbed = history(play(timing=1))
    saved: dict[str, Any] = {}
    drawn = curriculum()

    async def on_step(record: Any) -> None:
        if record.step == kill_at:
            saved.update(state=drawn.state_dict(), num_draws=record.num_draws)
            # Nothing may be drawn while a checkpoint is written.
            await asyncio.sleep(5.0)
            assert saved["num_draws"] == world.controller._num_draws
        if record.step == kill_at + 1:
            raise Killed

    world = World(
        loop_settings(num_steps=NUM_STEPS + 1, max_lag=0),
        SeededGenerator(7),
        curriculum=drawn,
        seed=5,
        on_step=on_step,
    )
    with pytest.raises(Killed):
        run_virtual(world.controller.run())

    resumed = curriculum()
    resumed.load_state_dict(saved["state"])
    again = World(
        loop_settings(num_steps=NUM_STEPS, max_lag=0),
        SeededGenerator(8),
        curriculum=resumed,
        seed=5,
        attempt=2,
        first_step=kill_at,
        first_draw=saved["num_draws"],
    )
    again.run()
    checkpointed = history(world)[: saved["num_draws"]]
    assert checkpointed + history(again) == undisturbed


def test_an_attempt_that_starts_at_the_end_ends() -> None:
    async def for_ever() -> None:
        await asyncio.Event().wait()

    world = World(
        loop_settings(num_steps=4),
        ScriptedGenerator(marks=lambda n: "01"),
        attempt=2,
        first_step=4,
        beside=[for_ever],
    )
    summary = world.run()
    assert summary.num_steps == 0
    assert world.ledger.opened == {}


def test_loops_beside_training_run_and_their_failure_is_the_run_s() -> None:
    turns: list[float] = []

    async def clock() -> None:
        while True:
            await asyncio.sleep(1.0)
            turns.append(asyncio.get_running_loop().time())

    world = World(loop_settings(), ScriptedGenerator(marks=lambda n: "01"), beside=[clock])
    world.run()
    assert turns[:3] == [1.0, 2.0, 3.0]

    async def fail() -> None:
        await asyncio.sleep(2.5)
        raise OSError("the disk is full")

    world = World(loop_settings(), ScriptedGenerator(marks=lambda n: "01"), beside=[fail])
    with pytest.raises(OSError, match="disk is full"):
        world.run()
