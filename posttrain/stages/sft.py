"""Light supervised fine-tuning on the rows that screening kept, by TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from posttrain.data.chat import sft_record
from posttrain.errors import DataError
from posttrain.progress import say
from posttrain.stages.context import StageContext
from posttrain.stages.trl_job import TrainingJob, run_job


def sft(context: StageContext, model: Path, kept_rows: Collection[str] | None) -> dict[str, Any]:
    """Trains on the kept rows (None: on all) and leaves the policy in the stage's directory."""
    settings = context.settings.sft
    mix = context.instruction_mix(0)
    records = [
        sft_record(row, mix.resolve(row.system))
        for row in context.sft_rows
        if kept_rows is None or row.row_id in kept_rows
    ]
    if not records:
        raise DataError("sft: screening kept no row; lower screen.selection.drop_easiest")
    say(f"sft: {len(records)} of {len(context.sft_rows)} rows")
    metrics = run_job(
        TrainingJob(
            kind="sft",
            model=str(model),
            records=records,
            trainer={"max_length": context.settings.policy.max_length} | settings.trainer,
            deepspeed=settings.deepspeed,
            output=str(context.policy_of("sft")),
            seed=context.seed,
            threads=settings.threads,
            dtype=context.settings.policy.dtype,
        ),
        resources=context.settings.resources.learner,
        scratch=context.run.stage_dir("sft") / "ray",
    )
    return {"rows": len(records)} | metrics
