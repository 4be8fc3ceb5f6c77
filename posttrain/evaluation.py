"""How good a policy is on held-out tasks: pass@k and greedy accuracy, by domain, with intervals."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from judges.estimators import pass_at_k
from judges.judge import Encode
from posttrain.types import (
    GenerationRequest,
    Generator,
    Outcome,
    Prompt,
    Reward,
    Sampling,
    Scorer,
    SystemInstruction,
)

BOOTSTRAP_SAMPLES = 2000


class EvalSettings(BaseModel):
    """`num_samples` answers a prompt without a system instruction, one greedy one, and
    `instruction_samples` under each system instruction."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    k: list[int] = [1, 8]
    num_samples: int = Field(default=8, gt=0)
    instruction_samples: int = Field(default=1, ge=0)
    temperature: float = Field(default=1.0, gt=0)
    max_tokens: int = Field(default=512, gt=0)
    concurrency: int = Field(default=64, gt=0)

    @field_validator("k")
    @classmethod
    def _positive(cls, k: list[int]) -> list[int]:
        if not k or min(k) < 1:
            raise ValueError(f"k must be positive numbers, got {k}")
        return k


@dataclass(frozen=True, kw_only=True)
class PromptResult:
    """What one held-out prompt got. `outcomes` are those of the `n` sampled answers;
    `instructions` maps a system instruction to (answers, answers that followed it, correct)."""

    prompt_id: str
    domain: str
    n: int
    correct: int
    greedy_correct: bool
    outcomes: Mapping[str, int]
    tokens: int
    instructions: Mapping[str, tuple[int, int, int]]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over prompts with its 95% bootstrap interval."""

    mean: float
    low: float
    high: float


async def evaluate(
    prompts: Sequence[Prompt],
    *,
    generator: Generator,
    scorer: Scorer,
    encode: Encode,
    instructions: Sequence[SystemInstruction],
    settings: EvalSettings,
    label: str,
) -> list[PromptResult]:
    """One result a prompt, in order. `label` makes the requests of this evaluation unique."""
    gate = asyncio.Semaphore(settings.concurrency)
    sampled = Sampling(max_tokens=settings.max_tokens, temperature=settings.temperature)
    greedy = Sampling(max_tokens=settings.max_tokens, temperature=0.0)

    async def answers(
        prompt: Prompt, system: SystemInstruction | None, n: int, sampling: Sampling, name: str
    ) -> tuple[tuple[Reward, ...], int]:
        request = GenerationRequest(
            request_id=f"eval-{label}-{prompt.prompt_id}-{name}",
            prompt_token_ids=encode(prompt, system),
            num_rollouts=n,
            sampling=sampling,
        )
        rollouts = await generator.generate(request)
        rewards = await scorer.score(prompt, rollouts, system)
        return rewards, sum(len(r.completion_token_ids) for r in rollouts)

    async def one(prompt: Prompt) -> PromptResult:
        async with gate:
            rewards, tokens = await answers(prompt, None, settings.num_samples, sampled, "n")
            (best,), _ = await answers(prompt, None, 1, greedy, "greedy")
            followed = {}
            for system in instructions if settings.instruction_samples else ():
                under, _ = await answers(
                    prompt, system, settings.instruction_samples, sampled, system.name
                )
                followed[system.name] = (
                    len(under),
                    int(sum(r.components.get("instruction", 0.0) for r in under)),
                    sum(r.correct for r in under),
                )
        outcomes = {o.value: sum(r.outcome is o for r in rewards) for o in Outcome}
        return PromptResult(
            prompt_id=prompt.prompt_id,
            domain=prompt.domain,
            n=sum(r.correctness is not None for r in rewards),
            correct=sum(r.correct for r in rewards),
            greedy_correct=best.correct,
            outcomes={name: count for name, count in outcomes.items() if count},
            tokens=tokens,
            instructions=followed,
        )

    return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))


def metric_values(results: Sequence[PromptResult], k: Sequence[int]) -> dict[str, NDArray[Any]]:
    """Metric name -> one value a prompt `[N]`: pass@k, greedy, outcome shares, instructions.

    Two evaluations of the same prompts can be compared value by value (see `paired_difference`).
    """
    values: dict[str, list[float]] = {}
    for result in results:
        row = {f"pass@{j}": pass_at_k(result.n, result.correct, j) for j in k if j <= result.n}
        row["greedy"] = float(result.greedy_correct)
        total = sum(result.outcomes.values())
        for outcome in (Outcome.UNPARSABLE, Outcome.TRUNCATED):
            row[outcome.value] = result.outcomes.get(outcome.value, 0) / total
        row["tokens"] = result.tokens / total
        for name, (answers, followed, correct) in result.instructions.items():
            row[f"ignored/{name}"] = 1 - followed / answers
            row[f"pass@1/{name}"] = correct / answers
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    return {name: np.asarray(column) for name, column in values.items()}


def estimate(values: NDArray[Any], seed: int = 0) -> Estimate:
    """Mean and percentile bootstrap over prompts (Efron 1979)."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(values), size=(BOOTSTRAP_SAMPLES, len(values)))
    means = values[picks].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(mean=float(values.mean()), low=float(low), high=float(high))


def paired_difference(before: NDArray[Any], after: NDArray[Any], seed: int = 0) -> Estimate:
    """after − before on the same prompts, bootstrapped over the pairs."""
    if before.shape != after.shape:
        raise ValueError(
            f"{len(before)} values before and {len(after)} after: not the same prompts"
        )
    return estimate(after - before, seed)


def summarise(results: Sequence[PromptResult], k: Sequence[int]) -> dict[str, Any]:
    """`{"all": {metric: estimate}, "domains": {domain: {metric: estimate}}}` as plain values."""
    domains = sorted({r.domain for r in results})
    return {
        "all": _estimates(results, k),
        "domains": {d: _estimates([r for r in results if r.domain == d], k) for d in domains},
    }


def _estimates(results: Sequence[PromptResult], k: Sequence[int]) -> dict[str, dict[str, float]]:
    return {name: asdict(estimate(v)) for name, v in metric_values(results, k).items()}
