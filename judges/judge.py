"""A critic checkpoint answers each prompt until its difficulty is decided."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, Field

from judges.estimators import posterior
from judges.labels import LabelSettings, confident_label, label
from posttrain.errors import StageError
from posttrain.types import (
    GenerationRequest,
    Generator,
    Outcome,
    Prompt,
    Reward,
    Sampling,
    Scorer,
    SystemInstruction,
    Verdict,
)

Encode = Callable[[Prompt, SystemInstruction | None], tuple[int, ...]]


class JudgeSettings(BaseModel):
    """How a critic is sampled: `round_size` answers at a time until the label is decided or
    `max_samples` are scored. Not `adaptive`: exactly `max_samples`, what pass@k needs.

    `concurrency` counts prompts in flight.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    adaptive: bool = True
    round_size: int = Field(default=4, gt=0)
    max_samples: int = Field(default=16, gt=0)
    temperature: float = Field(default=1.0, gt=0)
    max_tokens: int = Field(default=512, gt=0)
    concurrency: int = Field(default=64, gt=0)
    labels: LabelSettings = LabelSettings()


@dataclass(slots=True)
class JudgeUsage:
    """What judging has cost so far. `samples` and `outcomes` include infrastructure errors."""

    prompts: int = 0
    samples: int = 0
    completion_tokens: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)


@dataclass(slots=True)
class _Tally:
    """The scored answers to one prompt so far."""

    correct: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)

    @property
    def scored(self) -> int:
        return self.outcomes.total() - self.outcomes[Outcome.INFRASTRUCTURE]

    def add(self, rewards: Iterable[Reward]) -> None:
        for reward in rewards:
            self.outcomes[reward.outcome] += 1
            self.correct += reward.correct


class CriticJudge:
    """Verdicts from a critic's own answers.

    `critic` is the checkpoint's fingerprint and `template` the chat template's hash: a verdict
    holds only for these, the system instruction and the sampling settings. `usage` adds up over
    calls.
    """

    def __init__(
        self,
        generator: Generator,
        scorer: Scorer,
        encode: Encode,
        settings: JudgeSettings,
        *,
        critic: str,
        template: str,
        system: SystemInstruction | None = None,
    ) -> None:
        self.usage = JudgeUsage()
        self._generator = generator
        self._scorer = scorer
        self._encode = encode
        self._settings = settings
        self._critic = critic
        self._template = template
        self._system = system

    async def judge(
        self, prompts: Iterable[Prompt], *, on_verdict: Callable[[Verdict], None]
    ) -> list[Verdict]:
        """Verdicts in the order of `prompts`, each handed to `on_verdict` as soon as it is there.

        A prompt enters when another leaves; none waits for a batch. Raises StageError when every
        answer of two rounds running could not be scored; what the generator or scorer raises
        passes through. Either way the other prompts are cancelled.
        """
        waiting = enumerate(prompts)
        verdicts: dict[int, Verdict] = {}
        workers = [
            asyncio.create_task(self._work(waiting, verdicts, on_verdict))
            for _ in range(self._settings.concurrency)
        ]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return [verdicts[i] for i in range(len(verdicts))]

    async def _work(
        self,
        waiting: Iterator[tuple[int, Prompt]],
        verdicts: dict[int, Verdict],
        on_verdict: Callable[[Verdict], None],
    ) -> None:
        for index, prompt in waiting:
            verdicts[index] = await self._judge_one(prompt)
            self.usage.prompts += 1
            on_verdict(verdicts[index])

    async def _judge_one(self, prompt: Prompt) -> Verdict:
        settings = self._settings
        token_ids = self._encode(prompt, self._system)
        tally = _Tally()
        rounds = unscored_running = 0
        while not self._done(tally):
            room = settings.max_samples - tally.scored
            size = min(settings.round_size, room) if settings.adaptive else room
            rewards = await self._sample(prompt, token_ids, rounds, size)
            tally.add(rewards)
            rounds += 1
            scored = any(r.outcome is not Outcome.INFRASTRUCTURE for r in rewards)
            unscored_running = 0 if scored else unscored_running + 1
            if unscored_running == 2:
                raise StageError(
                    f"none of {2 * size} answers to prompt {prompt.prompt_id} could be scored, in "
                    f"two rounds running ({rewards[0].explanation or 'no explanation given'}): "
                    "mend the scorer, then start the same command again"
                )
        return self._verdict(prompt, tally)

    def _done(self, tally: _Tally) -> bool:
        cap, scored = self._settings.max_samples, tally.scored
        if not self._settings.adaptive:
            return scored >= cap
        return label(scored, tally.correct, cap, self._settings.labels) is not None

    async def _sample(
        self, prompt: Prompt, token_ids: tuple[int, ...], round_number: int, size: int
    ) -> tuple[Reward, ...]:
        request = GenerationRequest(
            request_id=f"judge-{prompt.prompt_id}-{round_number}",
            prompt_token_ids=token_ids,
            num_rollouts=size,
            sampling=Sampling(
                max_tokens=self._settings.max_tokens, temperature=self._settings.temperature
            ),
        )
        rollouts = await self._generator.generate(request)
        rewards = await self._scorer.score(prompt, rollouts, self._system)
        assert len(rollouts) == len(rewards) == size
        self.usage.samples += size
        self.usage.completion_tokens += sum(len(r.completion_token_ids) for r in rollouts)
        self.usage.outcomes.update(r.outcome for r in rewards)
        return rewards

    def _verdict(self, prompt: Prompt, tally: _Tally) -> Verdict:
        settings = self._settings
        n, c = tally.scored, tally.correct
        decided = label(n, c, settings.max_samples, settings.labels)
        assert decided is not None
        if not settings.adaptive:
            decided_by = "fixed n"
        elif confident_label(n, c, settings.labels) is decided:
            decided_by = "confidence"
        else:
            decided_by = "cap"
        return Verdict(
            prompt_id=prompt.prompt_id,
            judge="critic",
            critic=self._critic,
            num_samples=n,
            num_correct=c,
            outcomes=dict(tally.outcomes),
            posterior=posterior(n, c),
            label=decided,
            decided_by=decided_by,
            sampling={
                "temperature": settings.temperature,
                "max_tokens": settings.max_tokens,
                "template": self._template,
                "system": self._system.name if self._system else None,
            },
        )
