"""The pools of a run: engines, scorers and a learner, started when first needed, stopped once.

Engines stay up from stage to stage and change weights instead of being started again: on a small
machine starting one costs more than a stage's whole generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from posttrain.types import PolicyVersion
from posttrain.workers.agreement import facts_of_checkpoint
from posttrain.workers.cluster import connect, disconnect, refuse_more_than_there_is
from posttrain.workers.demand import Demand
from posttrain.workers.generator import GeneratorPool
from posttrain.workers.heap import freeze_heap
from posttrain.workers.learner_ranks import RemoteLearner, start_learner
from posttrain.workers.scoring import RewardWorkers
from posttrain.workers.settings import (
    ActorResources,
    LearnerResources,
    LearnerSettings,
    LoraSettings,
    RolloutPoolSettings,
)
from posttrain.workers.transport import PublishedWeights, this_node
from posttrain.workers.weights import (
    clear_scratch,
    loadable,
    read_checkpoint,
    scratch_directory,
    write_weights,
)
from rewards.shaping import RewardSettings


class Pools:
    """Owns everything that runs on Ray for one run. Use it as a context manager."""

    def __init__(
        self,
        run_id: str,
        *,
        rollout: RolloutPoolSettings,
        judge: RolloutPoolSettings,
        learner: LearnerResources,
        rewards: RewardSettings,
        reward_workers: int,
        reward_judge: RolloutPoolSettings,
        reward_actor: ActorResources,
        demands: Sequence[Demand],
        deadline_s: float,
    ) -> None:
        self._demands = demands
        self._rollout = rollout
        self._judge = judge
        self._learner = learner
        self._rewards = rewards
        self._reward_workers = reward_workers
        self._reward_judge = reward_judge
        self._reward_actor = reward_actor
        self._deadline_s = deadline_s
        self._generators: GeneratorPool | None = None
        self._scorer: RewardWorkers | None = None
        self._served: str | None = None
        self._versions = 0
        self._run_id = run_id
        self.scratch = scratch_directory(run_id)
        self.learner_scratch = self.scratch / "learner"
        """Of what learners publish, on whatever node; the next to start there clears it first."""

    def __enter__(self) -> Self:
        """SettingsError if the cluster could never hold `demands`, what is in use at once."""
        clear_scratch(self._run_id)
        connect()
        try:
            refuse_more_than_there_is(self._demands)
        except BaseException:
            disconnect()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                if self._generators is not None:
                    self._generators.stop()
                if self._scorer is not None:
                    self._scorer.stop()
        finally:
            disconnect()
            clear_scratch(self._run_id)

    @property
    def scorer(self) -> RewardWorkers:
        if self._scorer is None:
            self._scorer = RewardWorkers.start(
                self._rewards,
                num_workers=self._reward_workers,
                judge=self._reward_judge,
                resources=self._reward_actor,
                deadline_s=self._deadline_s,
            )
        return self._scorer

    async def serving(self, model: str) -> GeneratorPool:
        """The engines, serving the checkpoint `model`."""
        if self._generators is None:
            self._generators = await self._start_engines(
                model, PolicyVersion(0, self._versions), self._rollout
            )
            freeze_heap()
        elif self._served != model:
            self._generators.check_model(facts_of_checkpoint(Path(model)))
            self._versions += 1
            version = PolicyVersion(0, self._versions)
            directory = self.scratch / str(version)
            state = loadable(read_checkpoint(Path(model)), self._generators.dtype)
            write_weights(state, directory)
            deadline_s = self._rollout.engine.update_deadline_s
            weights = await PublishedWeights.staged(
                directory, version, this_node(), deadline_s=deadline_s
            )
            await self._generators.update_weights(weights)
        self._served = model
        return self._generators

    async def start_critic(self, model: str) -> GeneratorPool:
        """Engines of a critic's own, serving the checkpoint `model`; whoever starts it stops it."""
        return await self._start_engines(model, PolicyVersion(0, 0), self._judge)

    def start_learner(
        self,
        model: str,
        settings: LearnerSettings,
        *,
        temperature: float,
        max_age: int,
        max_tokens: int,
        num_steps: int,
        seed: int,
        lora: LoraSettings | None = None,
        checkpoint: Path | None = None,
    ) -> RemoteLearner:
        """A learner that starts from the policy `model`, or goes on from `checkpoint`, which was
        trained from it. Whoever publishes its weights leaves the engines at a version that is no
        checkpoint's (see `serves_checkpoint`)."""
        return start_learner(
            model,
            settings,
            temperature=temperature,
            max_age=max_age,
            max_tokens=max_tokens,
            num_steps=num_steps,
            seed=seed,
            lora=lora,
            checkpoint=checkpoint,
            resources=self._learner,
            deadline_s=self._deadline_s,
            scratch=self.learner_scratch,
        )

    async def _start_engines(
        self, model: str, version: PolicyVersion, settings: RolloutPoolSettings
    ) -> GeneratorPool:
        return await GeneratorPool.start(
            model,
            version,
            settings.engine,
            replicas=settings.replicas,
            resources=settings.actor,
            deadline_s=self._deadline_s,
        )

    def serves_checkpoint(self, model: str) -> None:
        """The engines now hold what was saved as `model`, by another way than `serving`."""
        self._served = model
