"""Held-out accuracy: values by hand, intervals that cover, and what is asked of the engine."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from online_fakes import make_prompt, make_reward, make_rollout
from pydantic import ValidationError

from posttrain.evaluation import (
    EvalSettings,
    PromptResult,
    estimate,
    evaluate,
    metric_values,
    paired_difference,
    summarise,
)
from posttrain.types import (
    GenerationRequest,
    PolicyVersion,
    Prompt,
    Reward,
    Rollout,
    SystemInstruction,
)

BRIEF = SystemInstruction(name="brief", text="Answer only.", pattern="#.*")
STEPS = SystemInstruction(name="steps", text="Show steps.")


@dataclass
class MarkedEngine:
    """Answers with the marks that stand for (prompt, system, greedy); see `make_reward`. A mark
    with `!` behind it follows the instruction. Encodes a prompt as (number, system)."""

    marks: dict[tuple[int, str, bool], str]
    requests: list[GenerationRequest] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    def encode(self, prompt: Prompt, system: SystemInstruction | None) -> tuple[int, ...]:
        number = int(prompt.messages[0].content)
        return (number, ["", "brief", "steps"].index(system.name if system else ""))

    async def generate(self, request: GenerationRequest) -> tuple[Rollout, ...]:
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        number, system = request.prompt_token_ids
        name = ["", "brief", "steps"][system]
        marks = self.marks[number, name, request.sampling.temperature == 0].split()
        assert len(marks) == request.num_rollouts
        return tuple(
            make_rollout(request.request_id, i, mark, PolicyVersion(1, 0), length=2 + i)
            for i, mark in enumerate(marks)
        )

    async def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], system: SystemInstruction | None
    ) -> tuple[Reward, ...]:
        checked = system is not None and system.pattern is not None
        return tuple(
            make_reward(r.text[0], **({"instruction": float("!" in r.text)} if checked else {}))
            for r in rollouts
        )


def run(
    engine: MarkedEngine,
    numbers: Sequence[int],
    instructions: Sequence[SystemInstruction] = (),
    **settings: Any,
) -> list[PromptResult]:
    prompts = [make_prompt(n, domain="odd" if n % 2 else "even") for n in numbers]
    return asyncio.run(
        evaluate(
            prompts,
            generator=engine,
            scorer=engine,
            encode=engine.encode,
            instructions=instructions,
            settings=EvalSettings.model_validate({"k": [1], **settings}),
            label="rl",
        )
    )


def test_what_is_counted_for_a_prompt() -> None:
    engine = MarkedEngine(
        {
            (7, "", False): "1 0 u t 1",
            (7, "", True): "1",
            (7, "brief", False): "1! 0! 1",
            (7, "steps", False): "0 1 0",
        }
    )
    (result,) = run(engine, [7], [BRIEF, STEPS], num_samples=5, instruction_samples=3)
    assert result == PromptResult(
        prompt_id="p7",
        domain="odd",
        n=5,
        correct=2,
        greedy_correct=True,
        outcomes={"correct": 2, "wrong": 1, "unparsable": 1, "truncated": 1},
        tokens=2 + 3 + 4 + 5 + 6,
        instructions={"brief": (3, 2, 2), "steps": (3, None, 1)},
    )


def test_what_could_not_be_scored_counts_nowhere() -> None:
    engine = MarkedEngine(
        {(2, "", False): "1 ? 0", (2, "", True): "?", (2, "brief", False): "? 1!"}
    )
    (result,) = run(engine, [2], [BRIEF], num_samples=3, instruction_samples=2)
    assert (result.n, result.correct, result.greedy_correct) == (2, 1, None)
    assert result.outcomes == {"correct": 1, "wrong": 1, "infrastructure": 1}
    assert result.instructions == {"brief": (1, 1, 1)}


def test_what_is_asked_of_the_engine() -> None:
    engine = MarkedEngine(
        {
            (n, name, greedy): "1" if greedy or name else "1 1"
            for n in range(5)
            for name in ("", "brief", "steps")
            for greedy in (False, True)
        }
    )
    odd_name = SystemInstruction(name="brief", text="x")
    results = run(
        engine, range(5), [odd_name, STEPS], num_samples=2, max_tokens=40, temperature=0.7
    )
    assert [r.prompt_id for r in results] == [f"p{i}" for i in range(5)]
    asked = [
        (r.prompt_token_ids, r.num_rollouts, r.sampling.temperature, r.sampling.max_tokens)
        for r in engine.requests
        if r.prompt_token_ids[0] == 3
    ]
    assert asked == [
        ((3, 0), 2, 0.7, 40),
        ((3, 0), 1, 0.0, 40),
        ((3, 1), 1, 0.7, 40),
        ((3, 2), 1, 0.7, 40),
    ]
    assert all(r.sampling.top_p == 1 for r in engine.requests)


@pytest.mark.parametrize("name", ["n", "greedy"])
def test_requests_are_unique_whatever_an_instruction_is_called(name: str) -> None:
    engine = MarkedEngine({(1, "", False): "1 1", (1, "", True): "1", (1, "steps", False): "1"})
    encode = engine.encode
    engine.encode = (  # type: ignore[method-assign]
        lambda prompt, system: encode(prompt, STEPS if system else None)
    )
    run(engine, [1], [SystemInstruction(name=name, text="x")], num_samples=2)
    ids = [r.request_id for r in engine.requests]
    assert len(set(ids)) == len(ids) == 3
    assert all(i.startswith("eval-rl-p1-") for i in ids)


def test_instruction_samples_0_asks_without_instructions_only() -> None:
    engine = MarkedEngine({(1, "", False): "1", (1, "", True): "1"})
    (result,) = run(engine, [1], [BRIEF], num_samples=1, instruction_samples=0)
    assert result.instructions == {}


def test_no_more_prompts_than_wanted_are_under_way() -> None:
    marks = {(n, "", greedy): "1" for n in range(20) for greedy in (False, True)}
    for concurrency in (1, 3):
        engine = MarkedEngine(dict(marks))
        run(engine, range(20), num_samples=1, concurrency=concurrency)
        assert engine.most_running == concurrency


def result(**changed: Any) -> PromptResult:
    values: dict[str, Any] = {
        "prompt_id": "p",
        "domain": "maths",
        "n": 5,
        "correct": 2,
        "greedy_correct": True,
        "outcomes": {"correct": 2, "wrong": 1, "unparsable": 1, "truncated": 1},
        "tokens": 60,
        "instructions": {"brief": (4, 3, 1), "steps": (2, None, 1)},
    }
    return PromptResult(**{**values, **changed})


def test_metrics_of_one_prompt_by_hand() -> None:
    values = metric_values([result()], [1, 2, 5])
    # pass@2 of 2 in 5: 1 − (3/5)(2/4); pass@5: some pick of five holds a correct one.
    assert {name: column.tolist() for name, column in values.items()} == {
        "pass@1": [pytest.approx(0.4)],
        "pass@2": [pytest.approx(0.7)],
        "pass@5": [1.0],
        "greedy": [1.0],
        "unparsable": [0.2],
        "truncated": [0.2],
        "tokens": [12.0],
        "ignored/brief": [0.25],
        "pass@1/brief": [0.25],
        "pass@1/steps": [0.5],
    }


def test_every_prompt_has_a_value_or_nan_in_its_place() -> None:
    unscored = result(
        n=1,
        correct=1,
        greedy_correct=None,
        outcomes={"correct": 1, "infrastructure": 4},
        instructions={"brief": (0, 0, 0), "steps": (1, None, 1)},
    )
    values = metric_values([result(), unscored, result(greedy_correct=False)], [1, 5])
    assert {len(column) for column in values.values()} == {3}
    assert values["pass@1"].tolist() == pytest.approx([0.4, 1.0, 0.4])
    assert values["unparsable"].tolist() == [0.2, 0.0, 0.2]
    assert values["tokens"].tolist() == [12.0, 12.0, 12.0]
    for name in ("pass@5", "greedy", "ignored/brief", "pass@1/brief"):
        assert np.isnan(values[name]).tolist() == [False, True, False], name
    assert estimate(values["greedy"]).mean == 0.5
    difference = paired_difference(values["greedy"], np.ones(3))
    assert difference.mean == 0.5


def test_a_prompt_of_which_nothing_was_scored_does_not_stop_the_rest() -> None:
    nothing = result(n=0, correct=0, greedy_correct=None, outcomes={"infrastructure": 5})
    summary = summarise([result(domain="a"), nothing], [1])
    assert summary["all"]["pass@1"]["mean"] == pytest.approx(0.4)
    assert "pass@1" not in summary["domains"]["maths"]
    assert summary["domains"]["maths"]["tokens"]["mean"] == 12.0
    assert not any(math.isnan(e["mean"]) for e in summary["all"].values())


def test_the_summary_is_plain_and_by_domain() -> None:
    results = [
        result(domain="b", correct=5),
        result(domain="a", correct=0),
        result(domain="b", correct=0),
    ]
    summary = summarise(results, [1])
    assert list(summary["domains"]) == ["a", "b"]
    assert summary["all"]["pass@1"]["mean"] == pytest.approx(1 / 3)
    assert summary["domains"]["b"]["pass@1"]["mean"] == 0.5
    assert summary["domains"]["a"]["pass@1"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert summary["all"]["pass@1"] == asdict(estimate(np.array([1.0, 0.0, 0.0])))


def test_an_interval_covers_as_often_as_it_says() -> None:
    """95% of intervals hold the truth; 300 trials have a standard error of .013."""
    rng = np.random.default_rng(0)
    samples = rng.binomial(8, 0.3, size=(300, 60)) / 8
    covered = [(e.low <= 0.3 <= e.high) for e in map(estimate, samples)]
    assert 0.9 <= np.mean(covered) <= 0.99


def test_the_interval_has_the_width_of_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    found = estimate(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.mean == values.mean()
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20), st.floats(-5, 5))
def test_estimates_are_bracketed_reproducible_and_move_with_the_data(
    values: list[float], shift: float
) -> None:
    column = np.array(values)
    found = estimate(column)
    assert column.min() - 1e-9 <= found.low <= found.high <= column.max() + 1e-9
    assert estimate(column) == found
    moved = estimate(column + shift)
    assert moved.low == pytest.approx(found.low + shift, abs=1e-9)
    assert moved.high == pytest.approx(found.high + shift, abs=1e-9)


def test_a_paired_difference_sees_what_unpaired_intervals_hide() -> None:
    before = np.linspace(0, 0.9, 100)
    after = before + 0.05
    difference = paired_difference(before, after)
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.05, 0.05, 0.05))
    assert estimate(before).high > estimate(after).low
    flipped = paired_difference(after, before)
    assert flipped.mean == pytest.approx(-0.05)


def test_different_prompts_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="3 values before and 2 after: not the same prompts"):
        paired_difference(np.zeros(3), np.zeros(2))


def test_no_values_no_estimate() -> None:
    for nothing in (np.array([]), np.array([math.nan])):
        with pytest.raises(ValueError, match="no prompt has a value"):
            estimate(nothing)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"k": []}, "k must be positive numbers"),
        ({"k": [0, 1]}, "k must be positive numbers"),
        ({"k": [1, 9]}, r"pass@9 needs as many answers a prompt; eval.num_samples is 8"),
        ({"temperature": 0}, "greater than 0"),
    ],
)
def test_settings_that_cannot_be_measured(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        EvalSettings.model_validate(fields)
