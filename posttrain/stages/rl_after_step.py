"""What follows each step of RL: its record, and now and then a checkpoint or an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from curricula.sampler import DifficultySampler, UniformSampler
from posttrain.online.metrics import StepRecord
from posttrain.online.status import status
from posttrain.progress import Progress
from posttrain.rollout_log import RolloutLog
from posttrain.stages.context import StageContext
from posttrain.stages.rl_beside import Beside
from posttrain.stages.rl_checkpoint import LoopState, RLCheckpoints
from posttrain.stages.rl_roles import Role, RoleTimes
from posttrain.types import PolicyVersion

STAGE = "rl"


class Saver(Protocol):
    """What is asked of the learner here."""

    async def save_checkpoint(self, directory: Path, version: PolicyVersion) -> None: ...

    async def save_policy(self, directory: Path, tokenizer_path: str) -> None: ...


class AfterStep:
    """The controller's `on_step`. Reads the state of the step before its first await, as that
    contract asks (see `posttrain.online.controller`)."""

    def __init__(
        self,
        context: StageContext,
        model: Path,
        attempt: int,
        first_step: int,
        curriculum: DifficultySampler | UniformSampler,
        learner: Saver,
        roles: Mapping[str, Role],
        beside: Beside,
    ) -> None:
        self._context = context
        self._model = model
        self._attempt = attempt
        self._curriculum = curriculum
        self._learner = learner
        self._roles = RoleTimes(roles)
        self._beside = beside
        settings = context.settings.rl
        self._settings = settings
        self._checkpoints = RLCheckpoints(context.run.stage_dir(STAGE), settings.keep_checkpoints)
        self._progress = Progress(STAGE, settings.num_steps, done=first_step)
        self._last: tuple[LoopState, PolicyVersion] | None = None
        self._saved_step = first_step
        self.rollouts = RolloutLog(context.run.rollouts_dir, attempt)

    async def __call__(self, record: StepRecord) -> None:
        if self._settings.max_lag == 0:
            # Nothing is drawn meanwhile, so what it changes is the same in every run.
            await self._beside.rescreen_now(record.version)
        # Kept at every step: by the time that a signal comes, the curriculum has moved on.
        state = LoopState(
            step=record.step,
            num_draws=record.num_draws,
            plans=record.plans,
            learned=record.learned,
            curriculum=self._curriculum.state_dict(),
            teacher_lead=record.metrics.get("teacher/lead"),
        )
        self._last = state, record.version
        metrics = {**record.metrics, **self._roles.metrics()}
        self._write(record.step, metrics)
        self._progress.advance(status(metrics))
        last = record.step == self._settings.num_steps
        if record.step % self._settings.checkpoint_every == 0 or last:
            await self._save(state, record.version)
        await self._export(record.step)
        await self._beside.reached(record.version)

    async def make_up(self) -> None:
        """Before the first step: what a kill left out after the checkpoint that the stage goes on
        from, its export and its evaluation."""
        self._beside.make_up(self._saved_step)
        if self._saved_step and not self._export_of(self._saved_step).exists():
            await self._export(self._saved_step)

    async def save_last(self) -> int | None:
        """A checkpoint of the last step on record, while the learner's weights are still those;
        returns its step, None before the first of all."""
        if self._last is not None and self._last[0].step > self._saved_step:
            await self._save(*self._last)
        return self._saved_step or None

    def where_it_goes_on(self) -> str:
        """For whoever has to start again."""
        if not self._saved_step:
            return "There is no checkpoint yet: the same command begins the stage anew."
        step = self._saved_step
        return f"The same command goes on from the last checkpoint, {STAGE} step {step}."

    async def _export(self, step: int) -> None:
        every = self._settings.export_every
        if every is not None and step % every == 0:
            await self._learner.save_policy(self._export_of(step), str(self._model))

    def _export_of(self, step: int) -> Path:
        return self._context.run.stage_dir(STAGE) / f"export-{step}"

    async def _save(self, state: LoopState, version: PolicyVersion) -> None:
        self.rollouts.flush()
        await self._checkpoints.save(
            state,
            save_learner=lambda directory: self._learner.save_checkpoint(directory, version),
            commit=lambda: self._context.ledger.commit_step(state.step),
        )
        self._saved_step = state.step
        await self._context.keep()

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        pool = {
            f"pool/{domain}/{bucket}": count
            for domain, buckets in self._curriculum.pool().items()
            for bucket, count in buckets.items()
        }
        quotas = {f"quota/{domain}": q for domain, q in self._curriculum.quotas().items()}
        named = {"stage": STAGE, "step": step, "attempt": self._attempt}
        self._context.metrics.append({**named, **metrics, **quotas, **pool})
