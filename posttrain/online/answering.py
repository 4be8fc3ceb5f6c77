"""One draw's way from a prompt to scored answers, within its deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from posttrain.online.accounting import Draw, stable_seed
from posttrain.online.settings import LoopSettings
from posttrain.types import (
    GenerationRequest,
    ObservedGenerator,
    Prompt,
    Rollout,
    RolloutGroup,
    Sampling,
    Scorer,
    SystemInstruction,
)


@dataclass(frozen=True, slots=True)
class Late:
    """A draw past its deadline. What is cut off is biased towards long answers: `longest` shows
    how much, the tokens of its longest one as far as it was written; None if that is not known."""

    longest: int | None


class Answering:
    """Asks the generator, then the scorer; `scoring` counts the draws that are with the latter.

    Args:
        encode: token ids of a prompt under a system instruction, generation prompt included.
        seed: where the seeds of the draws' samples come from when they have one.
    """

    def __init__(
        self,
        settings: LoopSettings,
        generator: ObservedGenerator,
        scorer: Scorer,
        encode: Callable[[Prompt, SystemInstruction | None], tuple[int, ...]],
        seed: int,
    ) -> None:
        self._settings = settings
        self._generator = generator
        self._scorer = scorer
        self._encode = encode
        self._seed = seed
        self.scoring = 0

    async def answer(self, draw: Draw) -> RolloutGroup | Late:
        sampling = self._sampling_of(draw)
        request = GenerationRequest(
            request_id=draw.draw_id,
            prompt_token_ids=self._encode(draw.prompt, draw.system),
            num_rollouts=self._settings.group_size,
            sampling=sampling,
        )
        rollouts: tuple[Rollout, ...] = ()

        async def work() -> RolloutGroup:
            nonlocal rollouts
            rollouts = await self._generator.generate(request)
            self.scoring += 1
            try:
                rewards = await self._scorer.score(draw.prompt, rollouts, draw.system)
            finally:
                self.scoring -= 1
            return RolloutGroup(
                draw_id=draw.draw_id,
                prompt=draw.prompt,
                system=draw.system.name if draw.system else None,
                sampling=sampling,
                rollouts=rollouts,
                rewards=rewards,
            )

        working = asyncio.create_task(work())
        try:
            await asyncio.wait([working], timeout=self._settings.draw_deadline_s)
            if working.done():
                return working.result()
            longest = max((len(r.completion_token_ids) for r in rollouts), default=None)
            if longest is None:
                longest = await self._generator.tokens_written(draw.draw_id)
            return Late(longest)
        finally:
            working.cancel()

    def _sampling_of(self, draw: Draw) -> Sampling:
        # Seeded sampling costs an engine throughput, and buys nothing where time decides anyway.
        lock_step = self._settings.max_lag == 0
        return Sampling(
            max_tokens=self._settings.max_tokens,
            temperature=self._settings.temperature,
            seed=stable_seed(self._seed, draw.number) if lock_step else None,
        )
