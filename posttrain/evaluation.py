"""How good a policy is on held-out tasks: pass@k and greedy accuracy, by domain, with intervals."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

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

    @model_validator(mode="after")
    def _enough_samples(self) -> Self:
        if max(self.k) > self.num_samples:
            raise ValueError(
                f"pass@{max(self.k)} needs as many answers a prompt; eval.num_samples is "
                f"{self.num_samples}"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class PromptResult:
    """What one held-out prompt got. `outcomes` are those of all sampled answers, `n` how many of
    them were scored; `instructions` maps a system instruction to (answers that were scored, that
    followed it or None where that cannot be checked, that were correct). `greedy_correct` is None
    for an unscored answer."""

    prompt_id: str
    domain: str
    n: int
    correct: int
    greedy_correct: bool | None
    outcomes: Mapping[str, int]
    tokens: int
    instructions: Mapping[str, tuple[int, int | None, int]]


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
                    prompt, system, settings.instruction_samples, sampled, f"under-{system.name}"
                )
                follows = int(sum(r.components.get("instruction", 0.0) for r in under))
                followed[system.name] = (
                    sum(r.correctness is not None for r in under),
                    None if system.pattern is None else follows,
                    sum(r.correct for r in under),
                )
        outcomes = {o.value: sum(r.outcome is o for r in rewards) for o in Outcome}
        return PromptResult(
            prompt_id=prompt.prompt_id,
            domain=prompt.domain,
            n=sum(r.correctness is not None for r in rewards),
            correct=sum(r.correct for r in rewards),
            greedy_correct=None if best.correctness is None else best.correct,
            outcomes={name: count for name, count in outcomes.items() if count},
            tokens=tokens,
            instructions=followed,
        )

    return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))


def metric_values(results: Sequence[PromptResult], k: Sequence[int]) -> dict[str, NDArray[Any]]:
    """Metric name -> one value a prompt `[N]`: pass@k, greedy, outcome shares, instructions.

    Answers that could not be scored count nowhere; a value that too few are left for is NaN. Two
    evaluations of the same prompts can be compared value by value (see `paired_difference`).
    """
    values: dict[str, list[float]] = {}
    for result in results:
        n, greedy = result.n, result.greedy_correct
        row = {f"pass@{j}": pass_at_k(n, result.correct, j) if j <= n else math.nan for j in k}
        row["greedy"] = math.nan if greedy is None else float(greedy)
        for outcome in (Outcome.UNPARSABLE, Outcome.TRUNCATED):
            row[outcome.value] = _share(result.outcomes.get(outcome.value, 0), n)
        row["tokens"] = result.tokens / sum(result.outcomes.values())
        for name, (answers, followed, correct) in result.instructions.items():
            if followed is not None:
                row[f"ignored/{name}"] = 1 - _share(followed, answers)
            row[f"pass@1/{name}"] = _share(correct, answers)
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    return {name: np.asarray(column) for name, column in values.items()}


def _share(count: int, total: int) -> float:
    return count / total if total else math.nan


def estimate(values: NDArray[Any], seed: int = 0) -> Estimate:
    """Mean and percentile bootstrap over prompts (Efron 1979). NaN is left out; ValueError if
    nothing else is there."""
    values = values[~np.isnan(values)]
    if not len(values):
        raise ValueError("no prompt has a value to average")
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
    """`{"all": {metric: estimate}, "domains": {domain: {metric: estimate}}}` as plain values; a
    metric is absent where no prompt has a value."""
    domains = sorted({r.domain for r in results})
    return {
        "all": _estimates(results, k),
        "domains": {d: _estimates([r for r in results if r.domain == d], k) for d in domains},
    }


def _estimates(results: Sequence[PromptResult], k: Sequence[int]) -> dict[str, dict[str, float]]:
    return {
        name: asdict(estimate(values))
        for name, values in metric_values(results, k).items()
        if not np.isnan(values).all()
    }
