"""Pairs from the groups that online RL left on disk, as far as the policy of today might write
them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from posttrain.data.pairs import MiningSettings, mine_pairs
from posttrain.progress import say
from posttrain.rollout_log import newest_groups
from posttrain.stages.context import StageContext
from posttrain.types import (
    Outcome,
    PolicyVersion,
    PreferencePair,
    Prompt,
    Reward,
    Rollout,
    RolloutGroup,
    Sampling,
    VersionSpan,
)
from posttrain.workers.generator import GeneratorPool

FRESH_ANSWERS = 256
"""Of the policy's own, how many say what is likely."""
BATCH = 64

_Sequence = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt and of its completion."""


async def stored_pairs(
    context: StageContext,
    generators: GeneratorPool,
    settings: MiningSettings,
    fresh: Sequence[RolloutGroup],
    done: Collection[str] = (),
) -> list[PreferencePair]:
    """`generators` serve the policy that DPO starts from, which has just written `fresh`; prompts
    that are `done` (by id) need no pairs from here. None comes from answers that an engine cannot
    score, or without fresh ones to compare with."""
    groups = _stored_groups(context, settings.stored_groups)
    wanted = [group for group in groups if group.prompt.prompt_id not in done]
    # An engine scores a sequence only with room for one more token.
    most = context.settings.policy.max_length - 1

    def fits(sequence: _Sequence) -> bool:
        return sum(map(len, sequence)) <= most

    pairs = [
        (pair, chosen, rejected)
        for group in wanted
        for pair in mine_pairs(group, settings)
        if fits(chosen := _tokens(context, pair, pair.chosen))
        and fits(rejected := _tokens(context, pair, pair.rejected))
    ]
    rollouts = [rollout for group in fresh for rollout in group.rollouts]
    own = [(r.prompt_token_ids, r.completion_token_ids) for r in rollouts]
    comparable = [sequence for sequence in own if fits(sequence)][:FRESH_ANSWERS]
    if not pairs or not comparable:
        return []
    least = float(np.quantile(await _likelihoods(generators, comparable), settings.unlikely))
    chosen_at = await _likelihoods(generators, [chosen for _, chosen, _ in pairs])
    rejected_at = await _likelihoods(generators, [rejected for _, _, rejected in pairs])
    both = zip(pairs, chosen_at, rejected_at, strict=True)
    likely = [pair for (pair, _, _), *found in both if min(found) >= least]
    say(
        f"dpo: of {len(pairs)} pairs that RL left {len(likely)} are likely now (both answers at "
        f"least {least:.2f} nats a token)"
    )
    return likely


def _stored_groups(context: StageContext, count: int) -> list[RolloutGroup]:
    """Without those whose task or system instruction the settings have lost since."""
    prompts = {prompt.prompt_id: prompt for prompt in context.train}
    systems = {None, *context.instruction_mix(0).by_name}
    stored = newest_groups(context.run.rollouts_dir, count, context.ledger.surviving_ends())
    asked = [rows for rows in stored if rows[0]["prompt_id"] in prompts]
    known = [rows for rows in asked if rows[0]["system"] in systems]
    if len(known) < len(asked):
        say(
            f"dpo: {len(asked) - len(known)} of {len(asked)} groups that RL left are passed over: "
            "system_instructions no longer has what they were answered under"
        )
    return [_group(context, prompts[rows[0]["prompt_id"]], rows) for rows in known]


def _group(
    context: StageContext, prompt: Prompt, rows: Sequence[Mapping[str, Any]]
) -> RolloutGroup:
    return RolloutGroup(
        draw_id=rows[0]["draw_id"],
        prompt=prompt,
        system=rows[0]["system"],
        sampling=Sampling(max_tokens=max(row["num_tokens"] for row in rows)),
        rollouts=tuple(_rollout(context, row, number) for number, row in enumerate(rows)),
        rewards=tuple(
            Reward(
                value=row["reward"],
                correctness=row["correctness"],
                outcome=Outcome(row["reward_outcome"]),
                components=json.loads(row["components"]),
            )
            for row in rows
        ),
    )


def _rollout(context: StageContext, row: Mapping[str, Any], number: int) -> Rollout:
    """Its tokens were not kept; pairs are made of texts, and their rules read lengths only."""
    tokens = _answer_tokens(context, row["text"])
    return Rollout(
        rollout_id=f"{row['draw_id']}/{number}",
        draw_id=row["draw_id"],
        prompt_token_ids=(),
        completion_token_ids=tokens,
        rollout_logprobs=(),
        text=row["text"],
        finish_reason=row["finish_reason"],
        version_spans=(VersionSpan(0, len(tokens), PolicyVersion.parse(row["oldest_version"])),),
    )


def _answer_tokens(context: StageContext, text: str) -> tuple[int, ...]:
    tokenizer = context.chat.tokenizer
    return (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)


def _tokens(context: StageContext, pair: PreferencePair, answer: str) -> _Sequence:
    system = context.instruction_mix(0).resolve(pair.system)
    return context.chat.encode(pair.prompt, system), _answer_tokens(context, answer)


async def _likelihoods(generators: GeneratorPool, sequences: Sequence[_Sequence]) -> list[float]:
    """Mean log-probability (nats) of a completion's tokens behind its prompt, one a sequence."""
    means: list[float] = []
    for start in range(0, len(sequences), BATCH):
        batch = sequences[start : start + BATCH]
        whole = [[*prompt, *completion] for prompt, completion in batch]
        scores = await generators.score_tokens_once(whole, f"stored-{len(means)}")
        means += [
            float(np.mean(score[-len(completion) :]))
            for score, (_, completion) in zip(scores, batch, strict=True)
        ]
    return means
