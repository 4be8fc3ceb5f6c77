"""Light DPO on corner cases: pairs that the policy itself shows, and pairs of one's own."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any, Final

from posttrain.atomic import staged_directory, write_atomically
from posttrain.cards import pairs_card
from posttrain.data.chat import dpo_record
from posttrain.errors import StarvationError
from posttrain.evaluation import Estimate, metric_values, paired_difference
from posttrain.pair_table import write_pairs
from posttrain.progress import say
from posttrain.run_dir import CARD_NAME
from posttrain.stages.context import StageContext
from posttrain.stages.held_out import measure_policy
from posttrain.stages.pair_mining import mine
from posttrain.stages.trl_job import keep_checkpoint, remove_checkpoints
from posttrain.stages.trl_stage import train

STAGE: Final = "dpo"


async def dpo(context: StageContext, model: Path) -> dict[str, Any]:
    """Trains on the pairs, with `model` as the reference, and leaves the policy, or `model` again
    if held-out accuracy would have fallen too far."""
    settings = context.settings.dpo
    pairs = list(context.pairs)
    if settings.mining is not None:
        pairs += await mine(context, model, settings.mining)
    if not pairs:
        raise StarvationError(
            "dpo: no pair found in the mining pass. Raise dpo.mining.num_prompts or samples, or "
            "leave dpo out of stages: there may be nothing to mend."
        )
    by_case = dict(sorted(Counter(pair.corner_case for pair in pairs).items()))
    say(f"dpo: {len(pairs)} pairs {by_case}")
    write_pairs(context.run.pairs_path, pairs)
    card = context.run.pairs_path.with_name(CARD_NAME)
    write_atomically(card, pairs_card(pairs, context.run.name_of(model)))
    mix = context.instruction_mix(0)
    records = [dpo_record(pair, mix.resolve(pair.system)) for pair in pairs]
    length = context.chat.length
    job, trained = train(
        context,
        STAGE,
        settings,
        model,
        records,
        tokens=sum(length([*r["prompt"], *r[c]]) for r in records for c in ("chosen", "rejected")),
        # The reference is the policy that comes in: asked once, not once a step.
        trainer={"precompute_ref_log_probs": True},
    )
    ((step, policy),) = trained.policies.items()
    change = await _change(context, model, policy)
    kept = change.mean >= -settings.guard.max_fall
    if kept:
        keep_checkpoint(job, step)
        context.evaluations[context.policy_of(STAGE)] = context.evaluations[policy]
    else:
        _keep_what_came_in(context, model, change)
    metrics = {"pairs": len(pairs), "pairs_by_case": by_case, "kept": kept}
    return metrics | {"pass@1_change": change.mean} | dict(trained.metrics)


async def _change(context: StageContext, model: Path, policy: Path) -> Estimate:
    """Held-out pass@1 after DPO minus before, prompt by prompt."""
    before = await measure_policy(context, model, "dpo-entered")
    after = await measure_policy(context, policy, STAGE)
    first, second = (metric_values(results, [1])["pass@1"] for results in (before, after))
    return paired_difference(first, second)


def _keep_what_came_in(context: StageContext, model: Path, change: Estimate) -> None:
    limit = context.settings.dpo.guard.max_fall
    say(
        f"dpo: held-out pass@1 fell by {-change.mean:.3f}, more than dpo.guard.max_fall = "
        f"{limit:g}; the policy that came in stays. Lower dpo.budget, raise dpo.trainer.beta, or "
        "look at dpo/pairs.jsonl"
    )
    target = context.policy_of(STAGE)
    with staged_directory(target) as staged:
        shutil.copytree(model, staged, dirs_exist_ok=True)
    remove_checkpoints(context.run.stage_dir(STAGE))
    shutil.rmtree(context.adapter_of(STAGE), ignore_errors=True)  # of an interrupted attempt
    context.evaluations[target] = context.evaluations[model]
