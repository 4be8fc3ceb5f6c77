"""Light supervised fine-tuning on the rows that screening kept, by TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from posttrain.config import Settings
from posttrain.data.chat import sft_record
from posttrain.data.prompts import spread_over_domains
from posttrain.errors import DataError
from posttrain.evaluation import PromptResult, evaluate, metric_values
from posttrain.inputs import teaching_of
from posttrain.progress import say
from posttrain.stages.checkpoint_choice import Choice, Measured, choose
from posttrain.stages.context import StageContext
from posttrain.stages.held_out import measure_policy
from posttrain.stages.teaching import DistillationJob, Teachers
from posttrain.stages.trl_job import keep_checkpoint
from posttrain.stages.trl_stage import train

STAGE: Final = "sft"


async def sft(
    context: StageContext, model: Path, kept_rows: Collection[str] | None
) -> dict[str, Any]:
    """Trains on the kept rows (None: on all) and leaves the policy in the stage's directory."""
    mix = context.instruction_mix(0)
    settings = context.settings.sft
    records = [
        # TRL leaves columns that it does not know beside a row until rows are packed.
        sft_record(row, mix.resolve(row.system)) | {"domain": row.prompt.domain}
        for row in context.sft_rows
        if kept_rows is None or row.row_id in kept_rows
    ]
    if not records:
        raise DataError("sft: screening kept no row; lower screen.selection.drop_easiest")
    say(f"sft: {len(records)} of {len(context.sft_rows)} rows")
    job, trained = train(
        context,
        STAGE,
        settings,
        model,
        records,
        tokens=sum(context.chat.length([*r["prompt"], *r["completion"]]) for r in records),
        checkpoints=settings.checkpoints.count,
        distillation=_distillation(context, model),
    )
    metrics: dict[str, Any] = {"rows": len(records)} | dict(trained.metrics)
    for who, asked in metrics.get("teacher", {}).items():
        say(
            f"sft: {who}: {asked['hit_rate']:.0%} of {asked['sequences']} sequences were stored; "
            f"{asked['seconds']:.1f} s spent on the rest, {asked['seconds_saved']:.1f} s saved"
        )
    *_, kept = trained.policies
    if len(trained.policies) > 1:
        entered, saved = await _measure(context, model, trained.policies)
        choice = choose(entered, saved, settings.checkpoints.max_fall)
        _tell(choice, entered, saved, context.settings)
        metrics["checkpoints"] = _table(choice, entered, saved)
        kept = choice.step
    keep_checkpoint(job, kept)
    return metrics | {"kept_step": kept}


def _distillation(context: StageContext, model: Path) -> DistillationJob | None:
    """The critic is the policy that enters the stage."""
    settings, weighing = context.settings, context.settings.sft.distillation
    if weighing is None:
        return None
    if weighing.weight == "ce_only":
        return DistillationJob(settings=weighing, teachers=None)
    assert context.teacher is not None
    pool = settings.resources.teacher
    teachers = Teachers(
        teaching=teaching_of(
            context.teacher, model, context.chat, settings.teacher, pool.dtype, context.run.path
        ),
        pool=pool,
        deadline_s=settings.resources.deadline_s,
    )
    return DistillationJob(settings=weighing, teachers=teachers)


async def _measure(
    context: StageContext, model: Path, policies: Mapping[int, Path]
) -> tuple[Measured, dict[int, Measured]]:
    """The policy that came in and those that were saved, on the same tasks."""
    count = context.settings.sft.checkpoints.prompts
    prompts = spread_over_domains(context.held_out, count)
    chosen = {prompt.prompt_id for prompt in prompts}
    k = context.settings.eval.k
    # An engine that is lost starts again from what it first served: that must not be a checkpoint
    # that goes when the choice is made. (What was measured before needs no engine by itself.)
    await context.pools.serving(str(model))
    measured = await measure_policy(context, model, "sft-entered")
    entered = [result for result in measured if result.prompt_id in chosen]
    saved = {}
    for step, policy in policies.items():
        results = await evaluate(
            prompts,
            generator=await context.pools.serving(str(policy)),
            scorer=context.pools.scorer,
            encode=context.chat.encode,
            instructions=[],
            settings=context.settings.eval.model_copy(update={"instruction_samples": 0}),
            label=f"sft-step-{step}",
        )
        saved[step] = _summary(results, k)
        say(f"sft step {step}: {_shown(saved[step], k)}")
    return _summary(entered, k), saved


def _summary(results: Sequence[PromptResult], k: Sequence[int]) -> Measured:
    values = metric_values(results, k)
    return Measured(
        accuracy=float(np.nanmean(values[f"pass@{min(k)}"])),
        reach=float(np.nanmean(values[f"pass@{max(k)}"])),
    )


def _shown(found: Measured, k: Sequence[int]) -> str:
    return f"pass@{min(k)} {found.accuracy:.3f} · pass@{max(k)} {found.reach:.3f}"


def _tell(
    choice: Choice, entered: Measured, saved: Mapping[int, Measured], settings: Settings
) -> None:
    k, limit = settings.eval.k, settings.sft.checkpoints.max_fall
    say(f"sft: step {choice.step} stays; what came in had {_shown(entered, k)}")
    if len(choice.over_constrained) == len(saved):
        say(
            f"sft: pass@{max(k)} fell by more than {limit:g} at every checkpoint: this much SFT "
            "takes away what RL would explore. Lower sft.budget or sft.trainer.learning_rate"
        )
    elif choice.over_constrained:
        steps = ", ".join(map(str, choice.over_constrained))
        say(f"sft: over-constrained from the sight of pass@{max(k)}: step {steps}")


def _table(
    choice: Choice, entered: Measured, saved: Mapping[int, Measured]
) -> dict[str, dict[str, Any]]:
    """One row a checkpoint, for the run's manifest."""
    return {"entered": asdict(entered)} | {
        str(step): asdict(found) | {"over_constrained": step in choice.over_constrained}
        for step, found in saved.items()
    }
