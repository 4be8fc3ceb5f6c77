"""What SFT and DPO have in common: settings and records become a job, its log becomes the run's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.progress import Progress, say
from posttrain.stages.budget import heavy, plan_budget
from posttrain.stages.context import StageContext
from posttrain.stages.teaching import DistillationJob
from posttrain.stages.trl_job import Trained, run_job
from posttrain.stages.trl_rank import RankJob
from posttrain.stages.trl_settings import Kind
from posttrain.workers.trainer_settings import TrainerSettings


def train(
    context: StageContext,
    stage: Kind,
    settings: TrainerSettings,
    model: Path,
    records: Sequence[Mapping[str, Any]],
    *,
    tokens: int,
    checkpoints: int = 1,
    trainer: Mapping[str, Any] | None = None,
    distillation: DistillationJob | None = None,
) -> tuple[RankJob, Trained]:
    """Trains on `records`, which have `tokens` tokens in all. `trainer` are the stage's own
    defaults. Raises as `run_job`."""
    policy, resources = context.settings.policy, context.settings.resources
    told = {"max_length": policy.max_length} | dict(trainer or {}) | settings.trainer
    budget = plan_budget(
        settings.model_copy(update={"trainer": told}),
        rows=len(records),
        tokens=tokens,
        ranks=resources.learner.ranks,
    )
    rl = context.settings.rl
    answers = rl.num_steps * rl.groups_per_step * rl.group_size
    in_run = "rl" in context.settings.stages
    warning = heavy(stage, budget, rows=len(records), rl_answers=answers if in_run else None)
    if warning is not None:
        say(warning)
    job = RankJob(
        kind=stage,
        model=str(model),
        trainer=told | dict(budget.trainer),
        deepspeed=settings.deepspeed,
        lora=policy.lora,
        directory=str(context.run.stage_dir(stage).resolve()),
        checkpoints=checkpoints,
        seed=context.seed,
        threads=settings.threads,
        dtype=policy.dtype,
        distillation=distillation,
    )
    trained = run_job(
        job,
        records,
        resources=resources.learner,
        deadline_s=resources.deadline_s,
        on_record=_Telling(context, stage),
    )
    passes = {"passes": budget.passes, "heavy": warning is not None}
    return job, Trained(
        metrics=passes | dict(trained.metrics), history=trained.history, policies=trained.policies
    )


class _Telling:
    """Takes down what a trainer logs and shows how far it is."""

    def __init__(self, context: StageContext, stage: Kind) -> None:
        self._context = context
        self._stage = stage
        self._progress: Progress | None = None
        self._step = 0

    def __call__(self, record: Mapping[str, Any]) -> None:
        step, steps = int(record["step"]), int(record["max_steps"])
        self._context.metrics.append({"stage": self._stage, **record})
        if self._progress is None:
            self._progress = Progress(self._stage, steps, done=self._step)
        note = f"loss {record['loss']:.3f}" if "loss" in record else ""
        for _ in range(self._step, step):
            self._progress.advance(note)
        self._step = step
