"""The pool of scorer processes behind a Ray actor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.types import Prompt, Reward, Rollout, SystemInstruction
from posttrain.workers.cluster import answer, close_actor, start_actor
from posttrain.workers.settings import ActorResources
from rewards.pool import ScorerPool
from rewards.shaping import RewardSettings


class RewardActor:
    """Holds a `ScorerPool` on whatever node Ray puts it."""

    def __init__(self, num_workers: int, settings: RewardSettings) -> None:
        self._pool = ScorerPool(num_workers, settings)

    async def ready(self) -> None:
        pass

    async def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], system: SystemInstruction | None
    ) -> tuple[Reward, ...]:
        return await self._pool.score(prompt, rollouts, system)

    async def close(self) -> None:
        self._pool.close()


class RewardWorkers:
    """Implements `posttrain.types.Scorer` through a `RewardActor`."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    @classmethod
    def start(
        cls,
        settings: RewardSettings,
        *,
        num_workers: int,
        resources: ActorResources,
        deadline_s: float,
    ) -> RewardWorkers:
        actor = start_actor(
            RewardActor,
            num_workers,
            settings,
            resources=resources,
            environment={"OMP_NUM_THREADS": "1"},
            deadline_s=deadline_s,
        )
        return cls(actor)

    async def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], system: SystemInstruction | None
    ) -> tuple[Reward, ...]:
        rewards: tuple[Reward, ...] = await answer(
            self._actor.score.remote(prompt, rollouts, system), "the reward actor"
        )
        return rewards

    def stop(self) -> None:
        close_actor(self._actor)
