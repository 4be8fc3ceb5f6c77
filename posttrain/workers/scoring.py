"""The pool of scorer processes behind a Ray actor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from posttrain.data.chat import ChatFormat
from posttrain.data.prompts import make_prompt
from posttrain.errors import EngineError
from posttrain.types import Message, PolicyVersion, Prompt, Reward, Rollout, SystemInstruction
from posttrain.workers.cluster import answer, close_actor, start_actor
from posttrain.workers.generator import GeneratorPool
from posttrain.workers.heap import freeze_heap
from posttrain.workers.settings import ActorResources, RolloutPoolSettings
from posttrain.workers.transport import this_node
from rewards.judge_access import engine_ask
from rewards.pool import ScorerPool, longest_s, without_logprobs
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
        freeze_heap()

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
    """Implements `posttrain.types.Scorer` through a `RewardActor`.

    How long a group waits depends on how many are before it, so what is bounded is the time between
    two answers of the actor, by what the deadlines of the verifiers add up to (`longest_s`).
    """

    def __init__(self, actor: Any, settings: RewardSettings) -> None:
        self._actor = actor
        self._settings = settings
        self._longest_s = 0.0
        """Of all groups so far: what is waited for may be another one than one's own."""
        self._answered_at = time.monotonic()

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
        return cls(actor, settings)

    async def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], system: SystemInstruction | None
    ) -> tuple[Reward, ...]:
        """Raises EngineError if the actor died, or is stuck: it has groups and answers none."""
        self._longest_s = max(self._longest_s, longest_s(prompt, len(rollouts), self._settings))
        asked_at = time.monotonic()
        read = tuple(map(without_logprobs, rollouts))
        scoring: asyncio.Task[tuple[Reward, ...]] = asyncio.create_task(
            answer(self._actor.score.remote(prompt, read, system), "the reward actor")
        )
        # Of a group that is given up meanwhile, too.
        scoring.add_done_callback(self._note_answer)
        while not scoring.done():
            left_s = max(asked_at, self._answered_at) + self._longest_s - time.monotonic()
            if left_s <= 0:
                raise EngineError(
                    f"the reward actor has scored nothing for {self._longest_s:g} s, more than the "
                    "deadlines in rewards allow for a group: it is stuck. Look for what it waits "
                    "for in /tmp/ray/session_latest/logs; the same command goes on with the run"
                )
            await asyncio.wait([scoring], timeout=left_s)
        return scoring.result()

    def _note_answer(self, scoring: asyncio.Task[tuple[Reward, ...]]) -> None:
        self._answered_at = time.monotonic()
        if not scoring.cancelled():
            scoring.exception()  # else asyncio says of a group that was given up that nobody asked

    def stop(self) -> None:
        close_actor(self._actor)
