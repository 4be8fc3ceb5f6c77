"""Asks a critic what the schedule says, with as many requests at the engine as it may have."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from judges.schedule import Ask, Schedule
from posttrain.errors import StageError
from posttrain.types import (
    GenerationRequest,
    Generator,
    Outcome,
    Prompt,
    Reward,
    Rollout,
    Sampling,
    Scorer,
    SystemInstruction,
)

Encode = Callable[[Prompt, SystemInstruction | None], tuple[int, ...]]

SCORING_PER_REQUEST = 2
"""Requests being scored for each one at the engine, at most: a slow scorer holds generation back
before answers pile up in memory."""

BROKEN_AFTER = 3
"""Prompts that are given up one after the other: it is the scorer that is broken, not they."""


@dataclass(slots=True)
class JudgeUsage:
    """What judging has cost so far. `samples` and `outcomes` include infrastructure errors."""

    prompts: int = 0
    samples: int = 0
    completion_tokens: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Answers:
    """What a request for answers to prompt `index` brought."""

    index: int
    rollouts: Sequence[Rollout]
    rewards: Sequence[Reward]

    @property
    def scored(self) -> int:
        return sum(r.outcome is not Outcome.INFRASTRUCTURE for r in self.rewards)

    @property
    def correct(self) -> int:
        return sum(r.correct for r in self.rewards)


class Sampler:
    """Draws a critic's answers.

    `sampling.seed`, if there is one, gives every answer to a prompt a seed of its own, the same
    however the answers are split over requests. `usage` adds up over calls.
    """

    def __init__(
        self,
        generator: Generator,
        scorer: Scorer,
        encode: Encode,
        *,
        sampling: Sampling,
        concurrency: int,
        system: SystemInstruction | None = None,
    ) -> None:
        self.usage = JudgeUsage()
        self._generator = generator
        self._scorer = scorer
        self._encode = encode
        self._sampling = sampling
        self._concurrency = concurrency
        self._system = system

    async def run(
        self,
        schedule: Schedule,
        prompt_of: Callable[[int], Prompt],
        on_answers: Callable[[Answers], None],
    ) -> dict[int, str]:
        """Until the schedule has nothing left to ask; each request's answers go to the schedule,
        then to `on_answers`. Returns the prompts that were given up, with what the scorer said: of
        two requests running no answer could be scored.

        A request enters when another leaves the engine; none waits for a batch or for scoring.
        Raises StageError when `BROKEN_AFTER` prompts are given up and no answer is scored between
        them; what generator, scorer or `on_answers` raise passes through. Either way the other
        requests are cancelled.
        """
        try:
            async with asyncio.TaskGroup() as group:
                run = _Run(self, schedule, prompt_of, on_answers, group)
                run.fill()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return run.given_up

    async def generate(self, prompt: Prompt, ask: Ask, attempt: int) -> tuple[Rollout, ...]:
        seed = self._sampling.seed
        request = GenerationRequest(
            request_id=f"judge-{prompt.prompt_id}-{attempt}",
            prompt_token_ids=self._encode(prompt, self._system),
            num_rollouts=ask.size,
            sampling=Sampling(
                max_tokens=self._sampling.max_tokens,
                temperature=self._sampling.temperature,
                top_p=self._sampling.top_p,
                seed=None if seed is None else _seed(seed, prompt.prompt_id) + ask.asked,
            ),
        )
        return await self._generator.generate(request)

    async def score(self, prompt: Prompt, ask: Ask, rollouts: tuple[Rollout, ...]) -> Answers:
        rewards = await self._scorer.score(prompt, rollouts, self._system)
        assert len(rollouts) == len(rewards) == ask.size
        self.usage.samples += ask.size
        self.usage.completion_tokens += sum(len(r.completion_token_ids) for r in rollouts)
        self.usage.outcomes.update(r.outcome for r in rewards)
        return Answers(ask.index, rollouts, rewards)

    @property
    def concurrency(self) -> int:
        return self._concurrency


class _Run:
    """One call of `Sampler.run`: what is at the engine and what is being scored."""

    def __init__(
        self,
        sampler: Sampler,
        schedule: Schedule,
        prompt_of: Callable[[int], Prompt],
        on_answers: Callable[[Answers], None],
        group: asyncio.TaskGroup,
    ) -> None:
        self._sampler = sampler
        self._schedule = schedule
        self._prompt_of = prompt_of
        self._on_answers = on_answers
        self._group = group
        self._at_engine = 0
        self._at_scorer = 0
        self._attempts: Counter[int] = Counter()
        self._unscored: set[int] = set()
        # That these fail once more says nothing about the scorer.
        self._failed_before = (schedule.asked > 0) & (schedule.scored == 0)
        self._given_up_running = 0
        self.given_up: dict[int, str] = {}

    def fill(self) -> None:
        limit = self._sampler.concurrency
        while self._at_engine < limit and self._at_scorer < SCORING_PER_REQUEST * limit:
            ask = self._schedule.next()
            if ask is None:
                return
            self._at_engine += 1
            self._group.create_task(self._serve(ask))

    async def _serve(self, ask: Ask) -> None:
        prompt = self._prompt_of(ask.index)
        attempt = self._attempts[ask.index]
        self._attempts[ask.index] += 1
        rollouts = await self._sampler.generate(prompt, ask, attempt)
        self._at_engine -= 1
        self._at_scorer += 1
        self.fill()
        answers = await self._sampler.score(prompt, ask, rollouts)
        self._at_scorer -= 1
        self._check_scored(prompt, answers)
        self._schedule.record(
            ask.index,
            asked=ask.size,
            scored=answers.scored,
            correct=answers.correct,
            again=ask.index not in self.given_up,
        )
        self._on_answers(answers)
        self.fill()

    def _check_scored(self, prompt: Prompt, answers: Answers) -> None:
        index = answers.index
        if answers.scored:
            self._unscored.discard(index)
            self._given_up_running = 0
        elif index not in self._unscored:
            self._unscored.add(index)
        else:
            why = answers.rewards[0].explanation or "no explanation given"
            self.given_up[index] = why
            self._given_up_running += not self._failed_before[index]
            if self._given_up_running == BROKEN_AFTER:
                raise unscorable(
                    f"{BROKEN_AFTER} prompts running, the last {prompt.prompt_id},", why
                )


def unscorable(which: str, why: str) -> StageError:
    """That it is not the prompts."""
    return StageError(
        f"no answer to {which} could be scored ({why}): mend the scorer, then start the same "
        "command again"
    )


def _seed(seed: int, prompt_id: str) -> int:
    digest = hashlib.blake2b(f"{seed} {prompt_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) >> 1  # below 2³¹, and room for the answers' numbers above it
