"""One vLLM engine in a Ray actor of its own."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from posttrain.types import GenerationRequest, PolicyVersion, Rollout
from posttrain.workers.agreement import ModelFacts
from posttrain.workers.engine import VllmEngine
from posttrain.workers.fingerprint import Fingerprint
from posttrain.workers.heap import freeze_heap
from posttrain.workers.settings import EngineSettings
from posttrain.workers.transport import Delivery, this_node

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where an engine runs and what it holds."""

    node_id: str
    facts: ModelFacts


class GeneratorActor:
    """Everything it does is `VllmEngine`'s. It lives as long as its engine core: when that dies, so
    does it, and Ray ends what is left of its process group. The same holds the other way round."""

    def __init__(self, model: str, version: PolicyVersion, settings: EngineSettings) -> None:
        self._model = model
        self._version = version
        self._settings = settings
        self._engine: VllmEngine | None = None

    async def ready(self) -> Placement:
        self._engine = await VllmEngine.start(self._model, self._version, self._settings)
        freeze_heap()
        return Placement(node_id=this_node(), facts=self._engine.facts())

    async def generate(self, request: GenerationRequest) -> tuple[Rollout, ...]:
        return await _or_die(self._running.generate(request))

    async def score_tokens(
        self, sequences: Sequence[Sequence[int]], label: str
    ) -> list[list[float]]:
        return await _or_die(self._running.score_tokens(sequences, label))

    async def update_weights(
        self, delivery: Delivery, version: PolicyVersion, published: Fingerprint
    ) -> dict[str, float]:
        async with delivery.received() as file:
            return await _or_die(self._running.update_weights(file, version, published))

    async def tokens_written(self, request_id: str) -> int | None:
        return self._running.tokens_written(request_id)

    async def stalled_s(self) -> float:
        return await _or_die(self._running.stalled_s())

    async def close(self) -> None:
        if self._engine is not None:  # else it was just being started
            self._engine.close()

    @property
    def _running(self) -> VllmEngine:
        assert self._engine is not None, "ready() comes first"
        return self._engine


async def _or_die(work: Awaitable[T]) -> T:
    """Ends this process if its engine core has died: whoever waits for it learns it at once."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        return await work
    except EngineDeadError:
        os._exit(1)
