"""Policies measured on the held-out tasks, each of them once in a run."""

from __future__ import annotations

from pathlib import Path

from posttrain.evaluation import PromptResult, evaluate
from posttrain.stages.context import StageContext


async def measure_policy(context: StageContext, model: Path, label: str) -> list[PromptResult]:
    """As the section `eval` says, on all held-out tasks; `label` names the requests."""
    if model not in context.evaluations:
        context.evaluations[model] = await evaluate(
            context.held_out,
            generator=await context.pools.serving(str(model)),
            scorer=context.pools.scorer,
            encode=context.chat.encode,
            instructions=list(context.instruction_mix(0).by_name.values()),
            settings=context.settings.eval,
            label=label,
        )
    return context.evaluations[model]
