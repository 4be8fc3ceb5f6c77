"""The sampling pass before DPO: preference pairs from what the policy itself answers."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

from posttrain.data.pairs import MiningSettings, at_most_per_prompt, mine_pairs
from posttrain.progress import Progress
from posttrain.stages.context import StageContext
from posttrain.stages.stored_pairs import stored_pairs
from posttrain.types import (
    GenerationRequest,
    PreferencePair,
    Prompt,
    RolloutGroup,
    Sampling,
    SystemInstruction,
)
from posttrain.workers.generator import GeneratorPool


async def mine(
    context: StageContext, model: Path, settings: MiningSettings
) -> list[PreferencePair]:
    """Pairs from groups that `model`, the policy that DPO starts from, answers now, and from
    stored ones if the settings ask for any; a prompt that RL drew often has no more than others."""
    generators = await context.pools.serving(str(model))
    groups = await _sample(context, generators, settings)
    pairs = [pair for group in groups for pair in mine_pairs(group, settings)]
    most = settings.pairs_per_prompt
    if settings.stored_groups:
        held = Counter(pair.prompt.prompt_id for pair in pairs)
        done = {prompt_id for prompt_id, count in held.items() if count >= most}
        pairs += await stored_pairs(context, generators, settings, groups, done)
    return at_most_per_prompt(pairs, most)


async def _sample(
    context: StageContext, generators: GeneratorPool, settings: MiningSettings
) -> list[RolloutGroup]:
    scorer = context.pools.scorer
    drawn = _draw(context, settings)
    sampling = Sampling(max_tokens=settings.max_tokens, temperature=settings.temperature)
    gate = asyncio.Semaphore(settings.concurrency)
    progress = Progress("mine pairs", len(drawn))

    async def one(prompt: Prompt, system: SystemInstruction | None) -> RolloutGroup:
        async with gate:
            request = GenerationRequest(
                request_id=f"mine-{prompt.prompt_id}",
                prompt_token_ids=context.chat.encode(prompt, system),
                num_rollouts=settings.samples,
                sampling=sampling,
            )
            rollouts = await generators.generate(request)
            rewards = await scorer.score(prompt, rollouts, system)
        progress.advance()
        return RolloutGroup(
            draw_id=request.request_id,
            prompt=prompt,
            system=system.name if system else None,
            sampling=sampling,
            rollouts=rollouts,
            rewards=rewards,
        )

    return list(await asyncio.gather(*(one(prompt, system) for prompt, system in drawn)))


def _draw(
    context: StageContext, settings: MiningSettings
) -> list[tuple[Prompt, SystemInstruction | None]]:
    """Training prompts, each with a system instruction or none; the seed decides."""
    rng = random.Random(context.seed)
    prompts = rng.sample(list(context.train), min(settings.num_prompts, len(context.train)))
    instructions = list(context.instruction_mix(0).by_name.values())
    return [
        (
            prompt,
            rng.choice(instructions)
            if instructions and rng.random() < settings.instructed_share
            else None,
        )
        for prompt in prompts
    ]
