"""The loop with the real ledger, killed and resumed from its checkpoints."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from online_fakes import (
    CountingCurriculum,
    ScriptedGenerator,
    TimedLearner,
    World,
    loop_settings,
    make_prompt,
    run_virtual,
)

from posttrain.audit import audit
from posttrain.ledger import Ledger
from posttrain.online.accounting import Draw
from posttrain.types import DrawOutcome

NUM_STEPS = 12
BATCH = ("sums", "sums", "words")
MARKS = ["10", "11", "01", "00", "10", "1?"]


class Run:
    """What survives a crash: the ledger on disk and the last checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step = 0
        self.num_draws = 0
        self.plans: list[list[str]] = []
        self.domain_of: dict[str, str] = {}
        self.learned: list[str] = []
        self.curriculum_state: dict[str, Any] = {"num_drawn": 0, "observed": [], "gates": []}

    def attempt(self, *, seconds: float | None) -> World:
        """One start of the run, cancelled after `seconds`. A checkpoint every third step."""
        with Ledger(self.path) as ledger:
            attempt = ledger.open_attempt("rl", self.step)
            curriculum = CountingCurriculum(BATCH, len(BATCH))
            curriculum.load_state_dict(self.curriculum_state)
            curriculum.domain_of = self.domain_of  # of every attempt

            async def on_step(record: Any) -> None:
                state, num_draws = curriculum.state_dict(), record.num_draws
                plans, learned = record.plans, record.learned
                await asyncio.sleep(0.4)
                if record.step % 3 == 0:
                    self.step, self.num_draws, self.plans = record.step, num_draws, plans
                    self.learned = learned
                    self.curriculum_state = state
                    ledger.commit_step(record.step)

            world = World(
                loop_settings(num_steps=NUM_STEPS, groups_per_step=len(BATCH), max_lag=2),
                ScriptedGenerator(
                    marks=lambda n: MARKS[n % len(MARKS)], seconds=lambda n: 0.5 + n % 4
                ),
                learner=TimedLearner(seconds=lambda step: 0.9),
                curriculum=curriculum,
                ledger=ledger,
                attempt=attempt,
                first_step=self.step,
                first_draw=self.num_draws,
                plans=self.plans,
                reissue=[
                    Draw(
                        draw_id=draw.draw_id,
                        prompt=make_prompt(int(draw.prompt_id[1:]), self.domain_of[draw.prompt_id]),
                        system=None,
                    )
                    for draw in ledger.open_draws(attempt)
                ],
                learned=self.learned,
                on_step=on_step,
            )

            async def for_a_while() -> None:
                async with asyncio.timeout(seconds):
                    await world.controller.run()

            if seconds is None:
                run_virtual(for_a_while())
            else:
                with pytest.raises(TimeoutError):
                    run_virtual(for_a_while())
        return world


@pytest.mark.parametrize("crashes", [[], [1.0], [11.3], [9.7, 4.1, 12.5], [8.0, 8.0, 8.0]])
def test_exactly_once_over_crashes(tmp_path: Path, crashes: list[float]) -> None:
    run = Run(tmp_path / "ledger.sqlite")
    for seconds in crashes:
        run.attempt(seconds=seconds)
    last = run.attempt(seconds=None)

    report = audit(run.path)
    assert report.ok, report.describe()
    assert report.num_attempts == len(crashes) + 1
    assert (report.counts["in_flight"], report.num_provisional) == (0, 0)
    assert report.counts[DrawOutcome.TRAINED] == NUM_STEPS * 3
    with Ledger.open_readonly(run.path) as ledger:
        rows = ledger._connection.execute("SELECT prompt_id, as_of_step, state FROM lineage")
        lineage = rows.fetchall()
    seats = Counter(BATCH)
    for step in range(1, NUM_STEPS + 1):
        trained_in = [p for p, at, state in lineage if (at, state) == (step, DrawOutcome.TRAINED)]
        assert Counter(run.domain_of[prompt_id] for prompt_id in trained_in) == seats
    # The curriculum of a checkpoint had drawn what its ledger had opened: none lost, none twice.
    prompts = sorted(int(prompt_id[1:]) for prompt_id, _, _ in lineage)
    assert prompts == list(range(run.curriculum_state["num_drawn"]))
    # It learned from each of them once, also where a checkpoint found its group ready to train.
    observed = Counter(prompt_id for prompt_id, *_ in last.curriculum.observed)
    assert set(observed.values()) == {1}
    trained = Counter(step for _, step, state in lineage if state == DrawOutcome.TRAINED)
    assert trained == dict.fromkeys(range(1, NUM_STEPS + 1), 3)


def test_what_was_learned_from_stays_so_until_it_ends() -> None:
    """Also if the next checkpoint comes before the draw is answered again."""
    again = Draw(draw_id="d1-0000000", prompt=make_prompt(99), system=None)
    world = World(
        loop_settings(num_steps=3, max_lag=2),
        ScriptedGenerator(marks=lambda n: "10", seconds=lambda n: 0.5 if n else 3.0),
        attempt=2,
        first_draw=1,
        reissue=[again],
        learned=[again.draw_id],
    )
    world.run()
    assert again.draw_id in world.records[0].learned
    assert again.draw_id in world.ledger.ids(DrawOutcome.TRAINED)
    assert "p99" not in {prompt_id for prompt_id, *_ in world.curriculum.observed}
    assert again.draw_id not in world.records[-1].learned


def test_a_resumed_run_draws_again_what_was_open(tmp_path: Path) -> None:
    run = Run(tmp_path / "ledger.sqlite")
    run.attempt(seconds=11.3)
    assert run.step > 0
    first_draw = run.num_draws
    again = run.attempt(seconds=None)
    requested = [request.request_id for request in again.generator.requests]
    reissued = [draw_id for draw_id in requested if draw_id.startswith("d1-")]
    assert 0 < len(reissued) <= 9
    assert requested[: len(reissued) + 1] == [*reissued, f"d2-{first_draw:07d}"]
    assert audit(run.path).num_voided > 0
