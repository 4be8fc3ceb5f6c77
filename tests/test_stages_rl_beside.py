"""Re-screening beside training: when a critic of its own gets new weights, and when not."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from online_fakes import make_prompt

from curricula.sampler import DifficultySampler
from posttrain.config import RLSettings, TrainingEvalSettings
from posttrain.data.instructions import InstructionMix
from posttrain.evaluation import PromptResult
from posttrain.online.rescreen import RescreenReport, RescreenSettings
from posttrain.stages import rl_beside
from posttrain.stages.rl_beside import Beside
from posttrain.types import PolicyVersion

REPORT = RescreenReport(prompts=1, samples=1, discarded=0, dropped=0, restored=0, labels={})


NOTED: list[dict[str, Any]] = []
"""What was written to the metrics since the last `beside`."""


class Slices:
    """In place of the re-screener: a slice takes until the test lets it end."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.begun: list[int] = []
        self.report = REPORT
        self.may_end = asyncio.Event()

    async def slice(self, step: int) -> RescreenReport:
        self.begun.append(step)
        await self.may_end.wait()
        self.may_end.clear()
        return self.report


class Publisher:
    def __init__(self) -> None:
        self.published: list[int] = []

    async def publish(self, version: PolicyVersion) -> dict[str, float]:
        self.published.append(version.step)
        return {}


def beside(monkeypatch: pytest.MonkeyPatch, publisher: Publisher | None, **settings_: Any) -> Any:
    monkeypatch.setattr(rl_beside, "Rescreener", Slices)
    settings = RLSettings(max_lag=2, rescreen=RescreenSettings(every_steps=10), **settings_)
    context: Any = SimpleNamespace(
        settings=SimpleNamespace(rl=settings),
        pools=SimpleNamespace(scorer=None),
        chat=SimpleNamespace(encode=None, template_hash=""),
        ledger=None,
        seed=0,
        held_out=[make_prompt(i, "sums" if i < 6 else "words") for i in range(8)],
        instruction_mix=lambda salt: InstructionMix([], salt),
        metrics=SimpleNamespace(append=NOTED.append),
        run=SimpleNamespace(metrics_path=None),
    )
    NOTED.clear()
    critic: Any = None if publisher is None else object()
    curriculum = object.__new__(DifficultySampler)
    engines: Any = SimpleNamespace(tokens=0)
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


async def test_nothing_begins_after_the_last_step(monkeypatch):
    publisher = Publisher()
    beside_ = beside(monkeypatch, publisher, num_steps=20)
    await train(beside_, range(20, 21))
    assert publisher.published == []
    assert not beside_._rescreening.busy


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


async def test_it_is_said_once_that_a_slice_is_late(monkeypatch, capsys):
    beside_ = beside(monkeypatch, Publisher())
    (loop,) = beside_.loops
    running = asyncio.create_task(loop())
    await train(beside_, range(1, 20))
    assert "still at work" not in capsys.readouterr().err
    await train(beside_, range(20, 41))
    said = capsys.readouterr().err
    assert said.count("rl: rl.rescreen is due at step 20 and still at work") == 1
    assert "raise its every_steps or concurrency" in said  # it has an engine of its own
    assert said.count("still at work") == 1
    running.cancel()


async def test_it_is_said_that_a_slice_decided_nothing(monkeypatch, capsys):
    beside_ = beside(monkeypatch, None)
    slices = beside_._rescreener
    slices.report = replace(REPORT, prompts=0, samples=0, discarded=16)
    slices.may_end.set()
    (loop,) = beside_.loops
    running = asyncio.create_task(loop())
    await train(beside_, range(1, 12))
    assert "re-screening of step 10 decided nothing" in capsys.readouterr().err
    running.cancel()


async def test_held_out_prompts_of_every_domain_are_measured_while_steps_go_on(monkeypatch):
    evaluation = TrainingEvalSettings(every_steps=2, prompts=4, k=[1], num_samples=1)
    beside_ = beside(monkeypatch, None, evaluation=evaluation)
    may_end = asyncio.Event()
    asked = []

    async def measure(prompts: Any, *, label: str, **_: Any) -> list[PromptResult]:
        asked.append((label, [prompt.domain for prompt in prompts]))
        await may_end.wait()
        return [
            PromptResult(
                prompt_id=p.prompt_id,
                domain=p.domain,
                n=1,
                correct=int(p.domain == "sums"),
                greedy_correct=False,
                outcomes={"correct": 1},
                tokens=3,
                instructions={},
            )
            for p in prompts
        ]

    monkeypatch.setattr(rl_beside, "evaluate", measure)
    evaluating, _ = beside_.loops
    running = asyncio.create_task(evaluating())
    await train(beside_, range(1, 4))
    assert asked == [("step-2", ["sums", "sums", "sums", "words"])]
    assert NOTED == []  # and step 3 was not kept waiting
    may_end.set()
    await train(beside_, range(4, 5))
    found = NOTED[0]
    assert (found["event"], found["step"], found["until_step"]) == ("evaluation", 2, 4)
    assert found["all"]["pass@1"]["mean"] == 0.75
    running.cancel()


@pytest.mark.parametrize(
    ("goes_on_from", "begun"),
    [(0, []), (3, []), (4, []), (6, ["step-6"]), (100, [])],
    ids=["anew", "none was due", "it was done", "it was left out", "it was the last"],
)
async def test_the_evaluation_that_a_kill_left_out_is_made_up(
    monkeypatch, tmp_path, goes_on_from, begun
):
    evaluation = TrainingEvalSettings(every_steps=2, prompts=4, k=[1], num_samples=1)
    beside_ = beside(monkeypatch, None, evaluation=evaluation)
    metrics = tmp_path / "metrics.jsonl"
    records = [
        *({"stage": "rl", "step": step, "attempt": 1} for step in (4, 5, 6)),
        # The second attempt goes on from step 5: this one is of weights that are gone.
        {"stage": "rl", "event": "evaluation", "step": 6, "attempt": 1},
        {"stage": "rl", "event": "evaluation", "step": 4, "attempt": 1},
        {"stage": "rl", "step": 6, "attempt": 2},
        {"stage": "sft", "event": "evaluation", "step": 6},
    ]
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    beside_._context.run.metrics_path = metrics
    asked = []

    async def measure(prompts: Any, *, label: str, **_: Any) -> list[PromptResult]:
        asked.append(label)
        return await asyncio.Future()

    monkeypatch.setattr(rl_beside, "evaluate", measure)
    evaluating, _ = beside_.loops
    running = asyncio.create_task(evaluating())
    beside_.make_up(goes_on_from)
    for _ in range(5):
        await asyncio.sleep(0)
    assert asked == begun
    running.cancel()
