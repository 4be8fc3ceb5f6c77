"""The loop among fakes: what ends how, what is recorded, what a crash leaves behind."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
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
    make_prompt,
    make_reward,
    run_virtual,
)
from pydantic import ValidationError

from posttrain.errors import EngineError, StarvationError
from posttrain.online.accounting import Draw
from posttrain.types import (
    DrawOutcome,
    GenerationRequest,
    PolicyVersion,
    Prompt,
    Reward,
    Rollout,
    SystemInstruction,
    TrainingBatch,
    VersionSpan,
)


def test_settings_have_bounds_and_a_starvation_limit_of_forty_steps() -> None:
    assert loop_settings(groups_per_step=3).starvation_draws == 120
    assert loop_settings(starvation_draws=7).starvation_draws == 7
    for wrong in ({"group_size": 1}, {"max_lag": -1}, {"release_window": 0}, {"unknown": 1}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            loop_settings(**wrong)


def test_a_run_from_first_publish_to_summary() -> None:
    world = World(
        loop_settings(num_steps=3),
        ScriptedGenerator(marks=lambda n: "10"),
        curriculum=CountingCurriculum(domains=("sums", "words")),
    )
    summary = world.run()
    assert world.publisher.versions == [PolicyVersion(1, step) for step in range(4)]
    assert [record.step for record in world.records] == [1, 2, 3]
    assert [batch.num_sequences for batch in world.learner.batches] == [4, 4, 4]
    assert summary.version == PolicyVersion(1, 3)
    assert summary.num_steps == 3
    assert summary.draws == {DrawOutcome.TRAINED: 6, DrawOutcome.UNUSED: 2}
    assert summary.draws_by_reason == {"stage_ended": 2}
    assert summary.trained_by_domain == {"sums": 3, "words": 3}
    assert summary.trained_tokens == 3 * 4 * 2
    assert summary.max_lag == 1
    # 1 s until the first groups are there, then 3 steps of 1 s back to back.
    assert summary.seconds == pytest.approx(4.0)
    assert summary.learning_seconds == pytest.approx(3.0)


def test_requests_carry_the_settings_and_the_draw() -> None:
    system = SystemInstruction(name="brief", text="Be brief.")
    encoded: list[tuple[str, str | None]] = []

    def encode(prompt: Prompt, instruction: SystemInstruction | None) -> tuple[int, ...]:
        encoded.append((prompt.prompt_id, instruction.name if instruction else None))
        return (7, len(encoded))

    world = World(
        loop_settings(num_steps=1, max_lag=0, temperature=0.5),
        ScriptedGenerator(marks=lambda n: "10"),
        draw_system=lambda: system,
        encode=encode,
        attempt=3,
    )
    world.run()
    assert encoded == [("p0", "brief"), ("p1", "brief")]
    request = world.generator.requests[1]
    assert request.request_id == "d3-0000001"
    assert request.prompt_token_ids == (7, 2)
    assert (request.num_rollouts, request.sampling.max_tokens) == (2, 8)
    assert (request.sampling.temperature, request.sampling.top_p) == (0.5, 1.0)
    assert world.ledger.opened["d3-0000001"] == {
        "prompt_id": "p1",
        "domain": "toy",
        "system": "brief",
        "attempt": 3,
        "drawn_at_step": 0,
    }
    assert world.groups[0][0].system == "brief"


def test_every_outcome_is_counted_once_and_told_to_everyone() -> None:
    marks = ["10", "11", "00", "??", "01", "1?"]

    def marks_of(call: int) -> str:
        return marks[call % len(marks)]

    world = World(loop_settings(num_steps=6), ScriptedGenerator(marks=marks_of))
    summary = world.run()
    assert set(world.ledger.opened) == set(world.ledger.closed)
    assert summary.draws == Counter(row["outcome"] for row in world.ledger.closed.values())
    assert summary.draws[DrawOutcome.TRAINED] == 12
    reasons = Counter(row["reason"] for row in world.ledger.closed.values() if row["reason"])
    assert summary.draws_by_reason == reasons
    assert set(reasons) == {"all_correct", "none_correct", "unscored", "stage_ended"}
    for draw_id, row in world.ledger.closed.items():
        if row["reason"] == "stage_ended":
            continue
        mark = marks[int(draw_id.removeprefix("d1-")) % len(marks)]
        assert (row["num_scored"], row["num_correct"]) == (2 - mark.count("?"), mark.count("1"))
    # Every scored group is observed, whatever became of it; groups without a score are not.
    scored = [group for group, _ in world.groups if group.num_scored]
    assert Counter(row[0] for row in world.curriculum.observed) == Counter(
        group.prompt.prompt_id for group in scored
    )
    ended = Counter(outcome for _, outcome in world.groups)
    assert ended[DrawOutcome.TRAINED] == 12
    assert ended[DrawOutcome.ZERO_ADVANTAGE] == summary.draws[DrawOutcome.ZERO_ADVANTAGE]


def test_a_draw_without_signal_frees_its_slot_at_once() -> None:
    """Lock-step with two slots: the third prompt is drawn when the first group is rejected."""
    world = World(
        loop_settings(num_steps=1, max_lag=0),
        ScriptedGenerator(marks=lambda n: "11" if n == 0 else "10", seconds=lambda n: [1, 9, 2][n]),
    )
    opened_at: dict[str, float] = {}
    open_draw = world.ledger.open_draw

    def noting_time(*, draw_id: str, **row: Any) -> None:
        opened_at[draw_id] = asyncio.get_running_loop().time()
        open_draw(draw_id=draw_id, **row)

    world.ledger.open_draw = noting_time
    world.run()
    assert opened_at == {"d1-0000000": 0.0, "d1-0000001": 0.0, "d1-0000002": 1.0}
    assert world.ledger.ids(DrawOutcome.ZERO_ADVANTAGE) == ["d1-0000000"]


def test_groups_are_trained_in_order_of_admission() -> None:
    world = World(
        loop_settings(num_steps=3, groups_per_step=2),
        ScriptedGenerator(marks=lambda n: "10", seconds=lambda n: 7.0 - n % 7),
    )
    world.run()
    assert world.ledger.ids(DrawOutcome.TRAINED) == [f"d1-{n:07d}" for n in range(6)]


def test_a_straggler_past_its_deadline_is_cancelled_and_stale() -> None:
    world = World(
        loop_settings(num_steps=2, draw_deadline_s=5.0),
        ScriptedGenerator(marks=lambda n: "10", seconds=lambda n: 1000.0 if n == 0 else 1.0),
    )
    summary = world.run()
    assert world.ledger.ids(DrawOutcome.STALE) == ["d1-0000000"]
    assert "d1-0000000" in world.generator.cancelled
    row = world.ledger.closed["d1-0000000"]
    assert (row["reason"], row["num_scored"], row["num_correct"]) == ("deadline", 0, 0)
    assert all(group.draw_id != "d1-0000000" for group, _ in world.groups)
    # The others wait behind it until the deadline, not longer: 5 s, then two steps.
    assert summary.seconds == pytest.approx(7.0)
    assert world.records[0].metrics["draws/stale"] == 1


def test_what_is_in_flight_at_the_end_is_unused_before_the_last_record() -> None:
    closed_at_record: list[int] = []
    flushed: list[int] = []

    async def on_step(record: Any) -> None:
        closed_at_record.append(len(world.ledger.closed))
        flushed.append(world.ledger.num_flushed)
        await asyncio.sleep(100.0)

    world = World(
        loop_settings(num_steps=2),
        ScriptedGenerator(marks=lambda n: "10", seconds=lambda n: 1.0 if n < 5 else 500.0),
        on_step=on_step,
    )
    world.run()
    assert closed_at_record[-1] == len(world.ledger.opened) == len(world.ledger.closed)
    assert flushed == [1, 2]
    unused = world.ledger.ids(DrawOutcome.UNUSED)
    assert unused == ["d1-0000004", "d1-0000005"]
    # One was answered and kept, the other was still being written.
    kept = [g.draw_id for g, outcome in world.groups if outcome is DrawOutcome.UNUSED]
    assert kept == ["d1-0000004"]
    assert world.generator.cancelled == ["d1-0000005"]
    assert {world.ledger.closed[draw_id]["step"] for draw_id in unused} == {2}


def test_generation_goes_on_while_a_step_is_evaluated() -> None:
    drawn: list[int] = []

    async def on_step(record: Any) -> None:
        drawn.append(world.generator.num_calls)
        await asyncio.sleep(10.0)
        drawn.append(world.generator.num_calls)

    world = World(
        loop_settings(num_steps=2), ScriptedGenerator(marks=lambda n: "10"), on_step=on_step
    )
    world.run()
    assert drawn[:2] == [4, 6]


def test_a_checkpoint_at_a_step_holds_what_its_steps_say() -> None:
    """`drawn_at_step` < N and `step` ≤ N are exactly what the ledger held when N was recorded."""
    seen: dict[int, tuple[set[str], set[str]]] = {}

    async def on_step(record: Any) -> None:
        seen[record.step] = (set(world.ledger.opened), set(world.ledger.closed))
        await asyncio.sleep(1.5)

    world = World(
        loop_settings(num_steps=5, groups_per_step=3, max_lag=2),
        ScriptedGenerator(
            marks=lambda n: ["10", "11", "01", "??"][n % 4], seconds=lambda n: 0.3 + n % 5 / 3
        ),
        learner=TimedLearner(seconds=lambda step: 0.7),
        on_step=on_step,
    )
    world.publisher.seconds = 0.2
    world.run()
    for step, (opened, closed) in seen.items():
        by_drawn = {d for d, row in world.ledger.opened.items() if row["drawn_at_step"] < step}
        by_step = {d for d, row in world.ledger.closed.items() if row["step"] <= step}
        assert opened == by_drawn
        assert closed == by_step


def test_resuming_reissues_open_draws_under_their_old_ids() -> None:
    brief = SystemInstruction(name="brief", text="Be brief.")
    world = World(
        loop_settings(num_steps=6),
        ScriptedGenerator(marks=lambda n: "10"),
        attempt=2,
        first_step=4,
        reissue=[
            Draw(draw_id="d1-0000011", prompt=make_prompt(70), system=brief),
            Draw(draw_id="d1-0000012", prompt=make_prompt(71), system=None),
        ],
    )
    summary = world.run()
    assert world.publisher.versions == [PolicyVersion(2, step) for step in (4, 5, 6)]
    assert world.ledger.ids(DrawOutcome.TRAINED) == [
        "d1-0000011",
        "d1-0000012",
        "d2-0000000",
        "d2-0000001",
    ]
    assert world.ledger.opened["d1-0000011"]["prompt_id"] == "p70"
    assert world.ledger.opened["d1-0000011"]["system"] == "brief"
    assert summary.num_steps == 2


def test_a_finished_stage_draws_nothing() -> None:
    world = World(loop_settings(num_steps=4), ScriptedGenerator(marks=lambda n: "10"), first_step=4)
    summary = world.run()
    assert (summary.num_steps, world.ledger.opened, world.records) == (0, {}, [])


def test_records_of_a_lock_step_run() -> None:
    world = World(loop_settings(num_steps=2, max_lag=0), ScriptedGenerator(marks=lambda n: "10"))
    world.publisher.seconds = 0.5
    world.run()
    metrics = world.records[1].metrics
    assert metrics["step_s"] == pytest.approx(2.5)
    assert metrics["learner_idle_share"] == pytest.approx(1 / 2.5)
    assert metrics["learner_busy_share"] == pytest.approx(1 / 2.5)
    assert metrics["publish_s"] == pytest.approx(0.5)
    assert metrics["generated_tokens_per_s"] == pytest.approx(8 / 2.5)
    assert (metrics["lag_max"], metrics["outstanding"]) == (0, 0)
    assert (metrics["pass@1"], metrics["zero_advantage_share"]) == (0.5, 0.0)
    assert (metrics["learner/loss"], metrics["publish/pause_s"]) == (0.25, 0.125)


def test_starvation_ends_the_run() -> None:
    marks = ["11"] * 9 + ["00"]
    world = World(
        loop_settings(starvation_draws=20),
        ScriptedGenerator(marks=lambda n: marks[n % 10]),
    )
    with pytest.raises(StarvationError, match="18 all correct, 2 none correct") as raised:
        world.run()
    assert "too easy" in str(raised.value)
    assert world.learner.batches == []


def test_rare_signal_is_not_starvation() -> None:
    world = World(
        loop_settings(num_steps=10, starvation_draws=20),
        ScriptedGenerator(marks=lambda n: "10" if n % 10 == 9 else "11"),
    )
    summary = world.run()
    assert summary.num_steps == 10
    assert summary.draws[DrawOutcome.ZERO_ADVANTAGE] > 100


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


class Bandit:
    """Three-armed bandits: generator, scorer, learner and publisher of one small softmax policy.

    Prompt token s picks the bandit, completion token a the arm; arm (s+1) mod 3 pays.
    """

    def __init__(self, seed: int, learning_rate: float = 0.2) -> None:
        self._rng = np.random.default_rng(seed)
        self._learning_rate = learning_rate
        self.weights = np.zeros((3, 3))
        self.served_weights = self.weights.copy()
        self.served = PolicyVersion(0, 0)

    async def generate(self, request: GenerationRequest) -> tuple[Rollout, ...]:
        logits = self.served_weights[request.prompt_token_ids[0]]
        version = self.served
        probabilities = np.exp(logits) / np.exp(logits).sum()
        await asyncio.sleep(float(self._rng.uniform(0.5, 1.5)))
        arms = self._rng.choice(3, size=request.num_rollouts, p=probabilities)
        return tuple(
            Rollout(
                rollout_id=f"{request.request_id}/{i}",
                draw_id=request.request_id,
                prompt_token_ids=request.prompt_token_ids,
                completion_token_ids=(int(arm),),
                rollout_logprobs=(math.log(probabilities[arm]),),
                text=str(arm),
                finish_reason="stop",
                version_spans=(VersionSpan(0, 1, version),),
            )
            for i, arm in enumerate(arms)
        )

    async def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], system: SystemInstruction | None
    ) -> tuple[Reward, ...]:
        state = rollouts[0].prompt_token_ids[0]
        return tuple(make_reward("1" if int(r.text) == (state + 1) % 3 else "0") for r in rollouts)

    async def step(self, batch: TrainingBatch) -> Mapping[str, float]:
        await asyncio.sleep(1.0)
        gradient = np.zeros_like(self.weights)
        for micro in batch.micro_batches:
            for row, column in zip(*np.nonzero(micro.loss_mask), strict=True):
                state, arm = micro.token_ids[row, column - 1], micro.token_ids[row, column]
                soft = np.exp(self.weights[state]) / np.exp(self.weights[state]).sum()
                ratio = min(soft[arm] / np.exp(micro.rollout_logprobs[row, column]), 5.0)
                direction = np.eye(3)[arm] - soft
                gradient[state] += ratio * micro.advantages[row, column] * direction
        self.weights += self._learning_rate * gradient
        return {}

    async def publish(self, version: PolicyVersion) -> Mapping[str, float]:
        self.served_weights, self.served = self.weights.copy(), version
        return {}


def _train_bandit(max_lag: int, seed: int = 0) -> tuple[list[float], Bandit]:
    bandit = Bandit(seed)
    world = World(
        loop_settings(
            num_steps=25, group_size=4, groups_per_step=3, max_lag=max_lag, starvation_draws=999
        ),
        bandit,
        scorer=bandit,
        learner=bandit,
        publisher=bandit,
        encode=lambda prompt, system: (int(prompt.prompt_id[1:]) % 3,),
    )
    world.run()
    return [record.metrics["reward_mean"] for record in world.records], bandit


@pytest.mark.parametrize("max_lag", [0, 2])
def test_reward_rises(max_lag: int) -> None:
    rewards, bandit = _train_bandit(max_lag)
    assert 0.15 < np.mean(rewards[:3]) < 0.55
    assert np.mean(rewards[-3:]) > 0.9
    assert [int(row.argmax()) for row in bandit.weights] == [1, 2, 0]


def test_lock_step_is_deterministic_for_a_seed() -> None:
    first, second, other = (_train_bandit(0, seed) for seed in (5, 5, 6))
    assert first[0] == second[0]
    assert np.array_equal(first[1].weights, second[1].weights)
    assert first[0] != other[0]
