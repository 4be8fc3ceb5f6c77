"""vLLM engines as Ray actors behind one `Generator`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import ray

from posttrain.types import GenerationRequest, PolicyVersion, Rollout
from posttrain.workers.cluster import answer, close_actor, start_actor
from posttrain.workers.engine import VllmEngine, engine_environment
from posttrain.workers.settings import ActorResources, EngineSettings


class GeneratorActor:
    """One engine in a process of its own. Everything it does is `VllmEngine`'s."""

    def __init__(self, model: str, version: PolicyVersion, settings: EngineSettings) -> None:
        self._model = model
        self._version = version
        self._settings = settings
        self._engine: VllmEngine | None = None

    async def ready(self) -> None:
        self._engine = await VllmEngine.start(self._model, self._version, self._settings)

    async def generate(self, request: GenerationRequest) -> tuple[Rollout, ...]:
        return await self._running.generate(request)

    async def score_tokens(
        self, sequences: Sequence[Sequence[int]], label: str
    ) -> list[list[float]]:
        return await self._running.score_tokens(sequences, label)

    async def update_weights(self, directory: str, version: PolicyVersion) -> dict[str, float]:
        return await self._running.update_weights(directory, version)

    async def close(self) -> None:
        self._running.close()

    @property
    def _running(self) -> VllmEngine:
        assert self._engine is not None, "ready() comes first"
        return self._engine


class GeneratorPool:
    """Engines that all serve the same version; a request goes to the one with least to do."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = list(actors)
        self._outstanding = [0] * len(self._actors)

    @classmethod
    def start(
        cls,
        model: str,
        version: PolicyVersion,
        settings: EngineSettings,
        *,
        replicas: int,
        resources: ActorResources,
        deadline_s: float,
    ) -> GeneratorPool:
        return cls(
            [
                start_actor(
                    GeneratorActor,
                    model,
                    version,
                    settings,
                    resources=resources,
                    environment=engine_environment(settings),
                    deadline_s=deadline_s,
                )
                for _ in range(replicas)
            ]
        )

    async def generate(self, request: GenerationRequest) -> tuple[Rollout, ...]:
        index = min(range(len(self._actors)), key=self._outstanding.__getitem__)
        self._outstanding[index] += request.num_rollouts
        reference = self._actors[index].generate.remote(request)
        try:
            rollouts: tuple[Rollout, ...] = await answer(reference, "a generator")
            return rollouts
        except asyncio.CancelledError:
            # Else the engine would go on writing an answer that nobody waits for.
            ray.cancel(reference)
            raise
        finally:
            self._outstanding[index] -= request.num_rollouts

    async def score_tokens(
        self, sequences: Sequence[Sequence[int]], label: str
    ) -> list[list[list[float]]]:
        """Each engine's log-probabilities of the same fixed tokens, engine by engine."""
        return list(
            await asyncio.gather(
                *(
                    answer(actor.score_tokens.remote(sequences, label), "a generator")
                    for actor in self._actors
                )
            )
        )

    async def update_weights(self, directory: str, version: PolicyVersion) -> list[float]:
        """Returns the seconds that each engine stood still, once all of them have confirmed."""
        reports = await asyncio.gather(
            *(
                answer(actor.update_weights.remote(directory, version), "a generator")
                for actor in self._actors
            )
        )
        return [report["pause_s"] for report in reports]

    def stop(self) -> None:
        for actor in self._actors:
            close_actor(actor)
