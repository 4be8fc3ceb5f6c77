"""The loop among fakes: what ends how, what is recorded, what comes when."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from online_fakes import (
    CountingCurriculum,
    ScriptedGenerator,
    TextScorer,
    TimedLearner,
    World,
    loop_settings,
    make_prompt,
    make_rollout,
)
from pydantic import ValidationError

from posttrain.errors import StarvationError
from posttrain.online.accounting import Draw
from posttrain.types import (
    DrawOutcome,
    PolicyVersion,
    Prompt,
    Reward,
    Rollout,
    SystemInstruction,
    TrainingBatch,
)


def test_settings_have_bounds_and_a_starvation_limit_of_forty_steps() -> None:
    assert loop_settings(groups_per_step=3).starvation_draws == 120
    assert loop_settings(starvation_draws=7).starvation_draws == 7


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"starvation_draws": 3}, "starvation_draws = 3 would end the run before the 4 draws"),
        ({"max_lag": 0, "straggler_lag": 1}, "straggler_lag needs max_lag above 0"),
        ({"group_size": 1}, "group_size"),
    ],
)
def test_a_loop_that_cannot_go_on_is_refused(changed: dict[str, int], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        loop_settings(**changed)
    for wrong in ({"group_size": 1}, {"max_lag": -1}, {"straggler_lag": -1}, {"unknown": 1}):
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
        draw_system=lambda number: system,
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


def test_a_seat_of_a_domain_without_hope_passes_to_another() -> None:
    class Impatient(CountingCurriculum):
        def instead_of(self, domain: str) -> str:
            return "easy" if self.gates.count(("hopeless", False)) >= 3 else domain

    world = World(
        loop_settings(num_steps=2, max_lag=0),
        ScriptedGenerator(marks=lambda n: ""),
        curriculum=(curriculum := Impatient(("easy", "hopeless"))),
    )
    world.generator.marks = lambda n: "11" if curriculum.domain_of[f"p{n}"] == "hopeless" else "10"
    world.run()
    trained = [g.prompt.domain for g, end in world.groups if end is DrawOutcome.TRAINED]
    assert trained == ["easy"] * 4
    # Three draws until the patience is over, one more for the second step's seat.
    assert curriculum.gates.count(("hopeless", False)) == 4
    assert curriculum.gates.count(("easy", True)) == 4
    assert [record.metrics["seats_passed_on"] for record in world.records] == [1, 1]


def test_ready_groups_leave_before_slow_ones_that_may_still_leave_later() -> None:
    world = World(
        loop_settings(num_steps=3, groups_per_step=2),
        ScriptedGenerator(marks=lambda n: "10", seconds=lambda n: 7.0 - n % 7),
    )
    world.run()
    trained = [int(draw_id[-7:]) for draw_id in world.ledger.ids(DrawOutcome.TRAINED)]
    assert trained == [2, 3, 0, 1, 4, 5]  # within a step in order of admission


def test_a_straggler_past_its_deadline_is_cancelled_and_stale() -> None:
    world = World(
        loop_settings(num_steps=2, draw_deadline_s=5.0),
        ScriptedGenerator(
            marks=lambda n: "10",
            seconds=lambda n: 1000.0 if n == 0 else 1.0,
            written={"d1-0000000": 77},
        ),
    )
    summary = world.run()
    assert world.ledger.ids(DrawOutcome.STALE) == ["d1-0000000"]
    assert "d1-0000000" in world.generator.cancelled
    row = world.ledger.closed["d1-0000000"]
    assert (row["reason"], row["num_scored"], row["num_correct"]) == ("deadline", 0, 0)
    assert all(group.draw_id != "d1-0000000" for group, _ in world.groups)
    # The second step may not leave it behind: it waits until the deadline, not longer.
    assert summary.seconds == pytest.approx(6.0)
    assert world.records[1].metrics["draws/stale"] == 1
    assert world.records[1].metrics["stale_length_mean"] == 77
    assert "stale_length_mean" not in world.records[0].metrics


def test_answers_whose_scores_are_late_count_as_long_as_they_are() -> None:
    class LateOnce(TextScorer):
        num_calls = 0

        async def score(
            self, prompt: Prompt, rollouts: Sequence[Rollout], system: SystemInstruction | None
        ) -> tuple[Reward, ...]:
            self.num_calls += 1
            if self.num_calls == 1:
                await asyncio.sleep(1000.0)
            return await super().score(prompt, rollouts, system)

    world = World(
        loop_settings(num_steps=2, draw_deadline_s=5.0),
        ScriptedGenerator(marks=lambda n: "10"),
        scorer=LateOnce(),
    )
    world.run()
    assert world.ledger.ids(DrawOutcome.STALE) == ["d1-0000000"]
    length = len(make_rollout("d", 0, "1", PolicyVersion(1, 0)).completion_token_ids)
    assert world.records[1].metrics["stale_length_max"] == length


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
    assert (metrics["lag_max"], metrics["lag/0"]) == (0, 2)
    assert {name: metrics[f"queue/{name}"] for name in ("generating", "scoring", "ready")} == {
        "generating": 0,
        "scoring": 0,
        "ready": 0,
    }
    assert (metrics["pass@1"], metrics["zero_advantage_share"]) == (0.5, 0.0)
    assert (metrics["learner/loss"], metrics["publish/pause_s"]) == (0.25, 0.125)


def test_what_the_learner_skips_was_not_trained() -> None:
    class Skipping(TimedLearner):
        async def step(self, batch: TrainingBatch) -> Mapping[str, float]:
            metrics = await super().step(batch)
            return {**metrics, "skipped_steps": int(len(self.batches) == 2)}

    world = World(
        loop_settings(num_steps=3, max_lag=0),
        ScriptedGenerator(marks=lambda n: "10"),
        learner=Skipping(),
    )
    summary = world.run()
    assert summary.draws == {DrawOutcome.TRAINED: 4, DrawOutcome.ERRORED: 2}
    assert summary.draws_by_reason == {"not_finite": 2}
    tokens = [record.metrics["trained_tokens"] for record in world.records]
    assert tokens == [8, 0, 8] and summary.trained_tokens == 16
    assert [record.metrics["signal_share"] for record in world.records] == [1.0] * 3


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
