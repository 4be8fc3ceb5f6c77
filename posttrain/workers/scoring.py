"""The pool of scorer processes behind a Ray actor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from posttrain.data.chat import ChatFormat
from posttrain.data.prompts import make_prompt
from posttrain.types import Message, PolicyVersion, Prompt, Reward, Rollout, SystemInstruction
from posttrain.workers.cluster import answer, close_actor, start_actor
from posttrain.workers.generator import GeneratorPool
from posttrain.workers.settings import ActorResources, RolloutPoolSettings
from posttrain.workers.transport import this_node
from rewards.judge_access import engine_ask
from rewards.pool import ScorerPool
from rewards.shaping import RewardSettings


class RewardActor:
    """Holds a `ScorerPool` on whatever node Ray puts it, and the engines of the judge that the
    settings name by its model."""

    def __init__(
        self,
        num_workers: int,
        settings: RewardSettings,
        judge: RolloutPoolSettings,
        deadline_s: float,
    ) -> None:
        self._num_workers = num_workers
        self._settings = settings
        self._judge = judge
        self._deadline_s = deadline_s
        self._engines: GeneratorPool | None = None

    async def ready(self) -> None:
        """Raises ModelError for a judge that cannot be served."""
        judged, ask = self._settings.judge, None
        if judged is not None and judged.model is not None:
            chat = ChatFormat(judged.model, "rewards.judge.model")
            self._engines = await GeneratorPool.start(
                judged.model,
                PolicyVersion(0, 0),
                self._judge.engine,
                replicas=self._judge.replicas,
                resources=self._judge.actor,
                deadline_s=self._deadline_s,
            )
            ask = engine_ask(
                self._engines,
                partial(_encode, chat),
                judged,
                max_length=self._judge.engine.max_model_len,
            )
        self._pool = ScorerPool(self._num_workers, self._settings, engine=ask)

    async def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], system: SystemInstruction | None
    ) -> tuple[Reward, ...]:
        return await self._pool.score(prompt, rollouts, system)

    async def close(self) -> None:
        self._pool.close()
        if self._engines is not None:
            self._engines.stop()


def _encode(chat: ChatFormat, message: Message) -> tuple[int, ...]:
    return chat.encode(make_prompt(message.content, reference=None, domain="judge"), None)


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
        judge: RolloutPoolSettings,
        resources: ActorResources,
        deadline_s: float,
    ) -> RewardWorkers:
        actor = start_actor(
            RewardActor,
            num_workers,
            settings,
            judge,
            deadline_s,
            resources=resources,
            environment={"OMP_NUM_THREADS": "1"},
            # Beside the driver if there is room: so no other node's loss is that of the scorers.
            place=NodeAffinitySchedulingStrategy(this_node(), soft=True),
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
