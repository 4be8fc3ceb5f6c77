"""Light DPO on corner cases, with pairs mined from the policy that enters the stage."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path
from typing import Any

from posttrain.atomic import write_atomically
from posttrain.cards import pairs_card
from posttrain.data.chat import conversation
from posttrain.data.pairs import mine_pairs
from posttrain.errors import StarvationError
from posttrain.pair_table import write_pairs
from posttrain.progress import Progress, say
from posttrain.run_dir import CARD_NAME
from posttrain.stages.context import StageContext
from posttrain.stages.trl_job import TrainingJob, run_job
from posttrain.types import (
    GenerationRequest,
    PreferencePair,
    Prompt,
    RolloutGroup,
    Sampling,
    SystemInstruction,
)


async def dpo(context: StageContext, model: Path) -> dict[str, Any]:
    """Mines pairs from `model`, which is also the reference, trains, leaves the policy."""
    settings = context.settings.dpo
    pairs = await _mine(context, model)
    if not pairs:
        raise StarvationError(
            "dpo: no pair found in the mining pass. Raise dpo.mining.num_prompts or samples, or "
            "leave dpo out of stages: there may be nothing to mend."
        )
    by_case = dict(Counter(pair.corner_case for pair in pairs))
    say(f"dpo: {len(pairs)} pairs {by_case}")
    mix = context.instruction_mix(0)
    records = [
        {
            "prompt": conversation(pair.prompt, mix.resolve(pair.system)),
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
        for pair in pairs
    ]
    write_pairs(context.run.pairs_path, pairs)
    card = context.run.pairs_path.with_name(CARD_NAME)
    write_atomically(card, pairs_card(pairs, str(model)))
    metrics = run_job(
        TrainingJob(
            kind="dpo",
            model=str(model),
            records=records,
            trainer={
                "max_length": context.settings.policy.max_length,
                # The reference is the policy that comes in: asked once, not once a step.
                "precompute_ref_log_probs": True,
            }
            | settings.trainer,
            deepspeed=settings.deepspeed,
            output=str(context.policy_of("dpo")),
            seed=context.seed,
            threads=settings.threads,
            dtype=context.settings.policy.dtype,
        ),
        resources=context.settings.resources.learner,
        scratch=context.run.stage_dir("dpo") / "ray",
    )
    return {"pairs": len(pairs), "pairs_by_case": by_case} | metrics


async def _mine(context: StageContext, model: Path) -> list[PreferencePair]:
    settings = context.settings.dpo.mining
    generators = await context.pools.serving(str(model))
    scorer = context.pools.scorer
    count = min(settings.num_prompts, len(context.train))
    rng = random.Random(context.seed)
    prompts = rng.sample(list(context.train), count)
    instructions = list(context.instruction_mix(0).by_name.values())
    systems: list[SystemInstruction | None] = [
        rng.choice(instructions)
        if instructions and rng.random() < settings.instructed_share
        else None
        for _ in prompts
    ]
    sampling = Sampling(max_tokens=settings.max_tokens, temperature=settings.temperature)
    gate = asyncio.Semaphore(settings.concurrency)
    progress = Progress("mine pairs", count)

    async def one(prompt: Prompt, system: SystemInstruction | None) -> list[PreferencePair]:
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
        group = RolloutGroup(
            draw_id=request.request_id,
            prompt=prompt,
            system=system.name if system else None,
            sampling=sampling,
            rollouts=rollouts,
            rewards=rewards,
        )
        return mine_pairs(group, settings)

    mined = await asyncio.gather(*(map(one, prompts, systems)))
    return [pair for pairs in mined for pair in pairs]
