"""One place in the pool of engines: the actor that fills it now, and the next one if that fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from posttrain.errors import EngineError, MismatchError, PosttrainError
from posttrain.progress import say
from posttrain.types import GenerationRequest, PolicyVersion, Rollout
from posttrain.workers.agreement import ModelFacts
from posttrain.workers.cluster import actor_ready, close_actor, create_actor, stop_actor
from posttrain.workers.engine import engine_environment
from posttrain.workers.generator_actor import GeneratorActor, Placement
from posttrain.workers.settings import ActorResources, EngineSettings
from posttrain.workers.transport import PublishedWeights
from posttrain.workers.workload import Workload

T = TypeVar("T")

CALLS_AT_ONCE = 1_000_000
"""More than are ever open. Behind as many open requests as Ray works on at once (1000, if nobody
says) health checks and new weights would wait, and a busy engine be taken for a stuck one. Ray's
concurrency groups would not do: each has an event loop of its own, and vLLM's engine is bound to
one."""

CHECKS_PER_DEADLINE = 4
"""How often a working engine's health is looked at within `hang_deadline_s`."""

TOKENS_WRITTEN_S = 5.0
"""For a figure that nobody should wait for."""


class EngineLost(Exception):
    """The engine that was asked is gone; whatever it was asked can be asked again elsewhere."""


class Replica:
    """Keeps one engine's actor, notices when it dies or hangs, and puts another in its place.

    An engine that failed is never asked again: its actor is killed, and Ray ends the actor's whole
    process group with it, so that whatever it might still have answered goes nowhere.

    Args:
        name: for messages.
        model: checkpoint that every engine of this place starts from, as `version`.
        deadline_s: for starting one.
    """

    def __init__(
        self,
        name: str,
        model: str,
        version: PolicyVersion,
        settings: EngineSettings,
        resources: ActorResources,
        deadline_s: float,
    ) -> None:
        self.name = name
        self.workload = Workload()
        self.version = version
        """What the engine has confirmed."""
        self._model = model
        self._model_version = version
        self._settings = settings
        self._resources = resources
        self._deadline_s = deadline_s
        self._actor: Any = None
        self._placement: Placement | None = None
        self._serving = False
        self._failures: list[str] = []
        """Since the last answer to a request."""
        self._watch: asyncio.Task[None] | None = None
        self._watched: Any = None

    @property
    def serving(self) -> bool:
        """There is an engine, and it may be given requests."""
        return self._serving

    @property
    def outstanding(self) -> int:
        """Answers that are being waited for."""
        return self.workload.outstanding

    @property
    def facts(self) -> ModelFacts:
        assert self._placement is not None, "start() comes first"
        return self._placement.facts

    async def start(self) -> None:
        """Starts an engine, which does not serve yet.

        Raises:
            PlacementError, StageError, ModelError: it did not start.
        """
        self._actor = create_actor(
            GeneratorActor,
            self._model,
            self._model_version,
            self._settings,
            resources=self._resources,
            environment=engine_environment(self._settings),
            calls_at_once=CALLS_AT_ONCE,
        )
        try:
            self._placement = await actor_ready(
                self._actor, self.name, resources=self._resources, deadline_s=self._deadline_s
            )
        except BaseException:
            self._actor = None
            raise
        self.version = self._model_version

    def serve(self) -> None:
        assert self._actor is not None, "start() comes first"
        self._serving = True

    async def restart(self) -> None:
        """Starts another engine in place of one that was lost, as often as it takes.

        Raises:
            EngineError: there were more than `max_restarts` failures since the last answer.
        """
        while self._actor is None:
            if len(self._failures) > self._settings.max_restarts:
                raise EngineError(
                    f"{self.name} failed {len(self._failures)} times without answering a request "
                    "in between, more than resources.rollout.engine.max_restarts = "
                    f"{self._settings.max_restarts} allows. It {'; then it '.join(self._failures)}"
                )
            say(f"{self.name} {self._failures[-1]}; another engine takes its place")
            try:
                await self.start()
            except PosttrainError as error:
                reason = str(error).partition("\n")[0]  # Ray's own go on for lines
                self._failures.append(f"did not start again: {reason}")

    async def generate(self, request: GenerationRequest) -> tuple[Rollout, ...]:
        """Raises EngineLost if the engine died or hung; its answer is then lost for good."""
        actor = self._engine()
        rollouts: tuple[Rollout, ...] = await self._work(
            actor.generate.remote(request), request.num_rollouts
        )
        if actor is self._actor:  # else it was lost after this answer
            self._failures.clear()
        return rollouts

    async def tokens_written(self, request_id: str) -> int | None:
        """None too if the engine cannot say."""
        try:
            async with asyncio.timeout(TOKENS_WRITTEN_S):
                written: int | None = await self._engine().tokens_written.remote(request_id)
                return written
        except (TimeoutError, RayActorError, EngineLost):
            return None

    async def score_tokens(
        self, sequences: Sequence[Sequence[int]], label: str
    ) -> list[list[float]]:
        """Raises EngineLost if the engine died or hung."""
        scores: list[list[float]] = await self._work(
            self._engine().score_tokens.remote(sequences, label), len(sequences)
        )
        return scores

    async def load(self, weights: PublishedWeights) -> dict[str, float]:
        """The engine's report (see `VllmEngine.update_weights`) once it has confirmed `weights`.

        Raises:
            EngineLost: it died, failed to load them, or did not confirm in time.
            MismatchError: what arrived is not what was published.
        """
        actor = self._engine()
        assert self._placement is not None, "start() comes first"
        deadline_s = self._settings.update_deadline_s
        async with weights.delivery(self._placement.node_id) as delivery:
            try:
                async with asyncio.timeout(deadline_s):
                    report: dict[str, float] = await self._answer(
                        actor,
                        actor.update_weights.remote(delivery, weights.version, weights.fingerprint),
                    )
            except TimeoutError as error:
                late = (
                    f"did not confirm the weights {weights.version} within {deadline_s:g} s "
                    "(resources.rollout.engine.update_deadline_s)"
                )
                self._lose(actor, late)
                raise EngineLost(f"{self.name} {late}") from error
            except MismatchError as error:
                raise MismatchError(f"{self.name}, {weights.version}: {error}") from error
            except EngineLost:
                raise
            except Exception as error:
                # It may hold some of the new weights, and stands still in the middle of an update.
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                failed = f"could not load the weights {weights.version}: {reason}"
                self._lose(actor, failed)
                raise EngineLost(f"{self.name} {failed}") from error
        self.version = weights.version
        return report

    def _engine(self) -> Any:
        """Whoever asks may have chosen this place just before its engine was lost."""
        if self._actor is None:
            raise EngineLost(f"{self.name} has no engine at the moment")
        return self._actor

    def stop(self) -> None:
        if self._actor is not None:
            close_actor(self._actor)

    async def _work(self, reference: Any, amount: int) -> Any:
        """Waits for the answer to `reference`, counted as outstanding and watched meanwhile."""
        actor = self._actor
        self.workload.add(amount)
        if self._watch is None or self._watch.done() or self._watched is not actor:
            self._watch, self._watched = asyncio.create_task(self._watch_over(actor)), actor
        try:
            return await self._answer(actor, reference)
        except asyncio.CancelledError:
            # Else the engine would go on writing an answer that nobody waits for.
            ray.cancel(reference)
            raise
        finally:
            self.workload.add(-amount)

    async def _answer(self, actor: Any, reference: Awaitable[T]) -> T:
        try:
            return await reference
        except RayTaskError as error:
            raise error.cause from error
        except RayActorError as error:
            self._lose(actor, "died")
            raise EngineLost(f"{self.name} died: {error}") from error
        except ObjectLostError as error:
            # A long answer stays on the engine's node until it is fetched, and goes with that node.
            self._lose(actor, "was lost with its node before its answer was fetched")
            raise EngineLost(f"{self.name} lost its answer: {error}") from error

    async def _watch_over(self, actor: Any) -> None:
        """Gives up an engine that is stuck, as long as it has anything to do."""
        deadline_s = self._settings.hang_deadline_s
        while self.outstanding and actor is self._actor:
            await asyncio.sleep(deadline_s / CHECKS_PER_DEADLINE)
            try:
                async with asyncio.timeout(deadline_s):
                    stalled_s = await actor.stalled_s.remote()
            except TimeoutError:
                self._lose(actor, f"did not answer a health check within {deadline_s:g} s")
            except RayActorError:
                return  # whoever waits for an answer learns it as well
            else:
                if stalled_s > deadline_s:
                    self._lose(actor, f"wrote no token for {stalled_s:.0f} s")

    def _lose(self, actor: Any, reason: str) -> None:
        """Gives `actor` up, once; those who wait for it learn it from Ray."""
        if actor is not self._actor:
            return
        stop_actor(actor)
        self._actor = None
        self._serving = False
        self._failures.append(reason)
