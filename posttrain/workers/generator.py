"""vLLM engines as Ray actors behind one `Generator`: load spread, losses made good."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

from posttrain.errors import EngineError
from posttrain.types import GenerationRequest, PolicyVersion, Rollout
from posttrain.workers.agreement import ModelFacts, check_dtype, check_model
from posttrain.workers.fingerprint import main_dtype
from posttrain.workers.replica import EngineLost, Replica
from posttrain.workers.settings import ActorResources, EngineSettings
from posttrain.workers.transport import PublishedWeights

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """One update of all engines: the longest pause in seconds (None if each of them was replaced),
    what all of them prefill again, and how many were replaced since the pool was started."""

    pause_s: float | None
    reprefilled_tokens: float
    replaced_engines: int


class GeneratorPool:
    """Engines of which each that serves has confirmed the newest weights. A request goes to the one
    with least to do.

    An engine that dies, hangs or is late is replaced. Its successor loads the newest weights before
    it serves; its open requests are given to another engine, once for each time that they lose
    one, under their old ids. Meanwhile requests go to the engines that are left, or wait.
    """

    def __init__(self, replicas: Sequence[Replica], settings: EngineSettings) -> None:
        self._replicas = list(replicas)
        self._settings = settings
        self._weights: PublishedWeights | None = None
        self._restarting: dict[str, asyncio.Task[None]] = {}
        self._replaced = 0
        self.tokens = 0
        """Written in all."""

    @classmethod
    async def start(
        cls,
        model: str,
        version: PolicyVersion,
        settings: EngineSettings,
        *,
        replicas: int,
        resources: ActorResources,
        deadline_s: float,
    ) -> GeneratorPool:
        """All engines, serving the checkpoint `model` as `version`.

        Raises:
            PlacementError, StageError, ModelError: one of them did not start.
        """
        pool = cls(
            [
                Replica(f"generator {i}", model, version, settings, resources, deadline_s)
                for i in range(replicas)
            ],
            settings,
        )
        try:
            async with asyncio.TaskGroup() as starting:
                for replica in pool._replicas:
                    starting.create_task(replica.start())
        except ExceptionGroup as group:
            pool.stop()
            raise group.exceptions[0] from group
        for replica in pool._replicas:
            replica.serve()
        return pool

    async def generate(self, request: GenerationRequest) -> tuple[Rollout, ...]:
        """Raises EngineError if the engines that were given this request were lost one after
        another, more often than `max_restarts` allows."""
        rollouts = await self._by_one(lambda replica: replica.generate(request), request.request_id)
        self.tokens += sum(len(rollout.completion_token_ids) for rollout in rollouts)
        return rollouts

    async def score_tokens_once(
        self, sequences: Sequence[Sequence[int]], label: str
    ) -> list[list[float]]:
        """One engine's log-probabilities (nats) of fixed tokens but the first, `[T-1]` for each
        sequence of T. Raises as `generate` does."""
        return await self._by_one(lambda replica: replica.score_tokens(sequences, label), label)

    async def _by_one(self, call: Callable[[Replica], Awaitable[T]], label: str) -> T:
        """What the engine with the least to do answers, or the next if that one is lost."""
        lost: EngineLost
        for _ in range(self._settings.max_restarts + 1):
            try:
                return await call(await self._least_loaded())
            except EngineLost as error:
                lost = error
        raise EngineError(
            f"request {label} was given to {self._settings.max_restarts + 1} engines "
            f"(resources.rollout.engine.max_restarts) and each was lost; the last: {lost}"
        ) from lost

    async def tokens_written(self, request_id: str) -> int | None:
        """As `posttrain.types.ObservedGenerator` says."""
        asked = await asyncio.gather(*(r.tokens_written(request_id) for r in self._serving()))
        return max((written for written in asked if written is not None), default=None)

    async def score_tokens(
        self, sequences: Sequence[Sequence[int]], label: str
    ) -> list[list[list[float]]]:
        """The log-probabilities that every serving engine gives the same fixed tokens. EngineError
        if all of them were lost with it, more often than `max_restarts` allows."""
        rounds = self._settings.max_restarts + 1
        for _ in range(rounds):
            await self._least_loaded()
            scores = await _answers(r.score_tokens(sequences, label) for r in self._serving())
            if scores:
                return scores
        raise EngineError(
            f"{label} was given to all engines {rounds} times "
            "(resources.rollout.engine.max_restarts) and each time all of them were lost; see "
            "/tmp/ray/session_latest/logs on their nodes"
        )

    async def update_weights(self, weights: PublishedWeights) -> UpdateReport:
        """Returns once every engine that serves has confirmed `weights`, which belong to the pool
        from now on; engines that are being replaced load them before they serve.

        Raises:
            ModelError: the engines compute in a data type that does not suit the weights.
            MismatchError: what arrived at an engine is not what was published.
            EngineError: an engine could not be replaced.
        """
        check_dtype(main_dtype(weights.fingerprint), self._settings.dtype)
        previous, self._weights = self._weights, weights
        try:
            reports = await _answers(replica.load(weights) for replica in self._serving())
        except BaseException:
            self._weights = previous
            weights.retire()
            raise
        if previous is not None:
            previous.retire()
        for task in self._restarts():
            if task.done():
                task.result()
        await self._least_loaded()
        return UpdateReport(
            pause_s=max((report["pause_s"] for report in reports), default=None),
            reprefilled_tokens=sum(report["reprefilled_tokens"] for report in reports),
            replaced_engines=self._replaced,
        )

    def check_model(self, learner: ModelFacts) -> None:
        """Raises ModelError if an engine's vocabulary or tokenizer is not the learner's."""
        for replica in self._replicas:
            check_model(learner, replica.facts)

    @property
    def dtype(self) -> str:
        """What the engines compute in."""
        return self._settings.dtype

    @property
    def update_deadline_s(self) -> float:
        """For new weights on their way."""
        return self._settings.update_deadline_s

    def idle_share(self) -> float:
        """Of the engines' time since this was last asked, the share in which they had nothing to
        do."""
        return fmean(replica.workload.idle_share() for replica in self._replicas)

    def stop(self) -> None:
        for task in self._restarting.values():
            task.cancel()
        for replica in self._replicas:
            replica.stop()
        if self._weights is not None:
            self._weights.retire()

    def _serving(self) -> list[Replica]:
        return [replica for replica in self._replicas if replica.serving]

    async def _least_loaded(self) -> Replica:
        """Waits while no engine serves; sees to it that those which do not are replaced."""
        while True:
            restarts = self._restarts()
            if serving := self._serving():
                return min(serving, key=lambda replica: replica.outstanding)
            done, _ = await asyncio.wait(restarts, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    def _restarts(self) -> list[asyncio.Task[None]]:
        """The task of each engine that does not serve, which brings back one that does or fails."""
        tasks = []
        for replica in self._replicas:
            if replica.serving:
                continue
            task = self._restarting.get(replica.name)
            failed = task and task.done() and not task.cancelled() and task.exception()
            if task is None or (task.done() and not failed):
                task = asyncio.create_task(self._bring_back(replica))
                self._restarting[replica.name] = task
            tasks.append(task)
        return tasks

    async def _bring_back(self, replica: Replica) -> None:
        """Starts an engine and has it confirm the newest weights before it serves."""
        while not replica.serving:
            await replica.restart()
            with suppress(EngineLost):  # it is counted there, and started again
                while self._weights and replica.version != self._weights.version:
                    await replica.load(self._weights)
                replica.serve()
        self._replaced += 1


async def _answers(calls: Iterable[Awaitable[T]]) -> list[T]:
    """What each engine answered, without those that were lost; raises what any of them raised."""
    answers = await asyncio.gather(*calls, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, EngineLost):
            raise answer
    return [answer for answer in answers if not isinstance(answer, BaseException)]
