"""All ranks of the learner as one: called together, and ended together when one of them fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from posttrain.errors import EngineError, PosttrainError, StageError
from posttrain.packing import deal
from posttrain.progress import say
from posttrain.types import PolicyVersion, TrainingBatch
from posttrain.workers.cluster import (
    create_actor,
    refuse_more_than_there_is,
    stop_actor,
    wait_until_ready,
)
from posttrain.workers.demand import Demand
from posttrain.workers.learner_actor import LearnerActor
from posttrain.workers.placement import Reservation
from posttrain.workers.settings import LearnerResources, LearnerSettings, LoraSettings
from posttrain.workers.transport import this_node

GRACE_S = 10.0
"""How long ranks may follow one that failed, until the others count as stuck in waiting for it."""


def start_learner(
    model: str,
    settings: LearnerSettings,
    *,
    temperature: float,
    max_age: int,
    max_tokens: int,
    num_steps: int,
    seed: int,
    lora: LoraSettings | None,
    checkpoint: Path | None,
    resources: LearnerResources,
    deadline_s: float,
    scratch: Path | None = None,
) -> RemoteLearner:
    """One actor per rank, all ready; arguments as `DeepSpeedLearner` takes them. `scratch` is where
    its weights will be published, and nothing else: on its node it is cleared first.

    Raises:
        SettingsError: the cluster has fewer devices than the ranks need.
        PlacementError: they were not free in time.
        StageError: a rank died while it started.
        Whatever `DeepSpeedLearner` raises.
    """
    refuse_more_than_there_is([Demand(role="learner", count=resources.ranks, each=resources)])
    _say_what_is_rounded(settings, lora)
    name = f"{LearnerActor.__name__} ({resources.ranks} of them, all at once)"
    began = time.monotonic()
    reserved = Reservation(name, resources, count=resources.ranks, deadline_s=deadline_s)
    ranks = [
        create_actor(
            LearnerActor,
            model,
            settings,
            temperature=temperature,
            max_age=max_age,
            max_tokens=max_tokens,
            num_steps=num_steps,
            seed=seed,
            lora=lora,
            checkpoint=None if checkpoint is None else str(checkpoint),
            rank=rank,
            num_ranks=resources.ranks,
            scratch=None if scratch is None or rank > 0 else str(scratch),
            resources=resources,
            place=reserved.place(rank),
            environment={"OMP_NUM_THREADS": str(settings.threads)},
        )
        for rank in range(resources.ranks)
    ]
    try:
        left = deadline_s - (time.monotonic() - began)
        (address,) = wait_until_ready([ranks[0].address.remote()], name, resources, left)
        left = deadline_s - (time.monotonic() - began)
        wait_until_ready([rank.ready.remote(address) for rank in ranks], name, resources, left)
    except BaseException:
        # Else they would hold their devices, or go on waiting for them.
        for rank in ranks:
            stop_actor(rank)
        reserved.release()
        raise
    return RemoteLearner(ranks, settings.step_deadline_s, reserved)


def _say_what_is_rounded(settings: LearnerSettings, lora: LoraSettings | None) -> None:
    if lora is not None and settings.dtype == "bfloat16":
        say(
            "rl: policy.lora is merged into bfloat16 weights for the engines and for the policy "
            "that is left, and what it changes by less than their rounding is lost there, which is "
            "most of it at first. Set rl.learner.dtype to float32 (engines may stay in bfloat16, "
            "and round as well), or leave policy.lora out and train all weights"
        )


class RemoteLearner:
    """Implements `posttrain.types.Learner`, and all else that is asked of the learner, through one
    `LearnerActor` per rank.

    Every method raises:
        EngineError: a rank died, or they were not done within `step_deadline_s`.
        StageError: a rank failed for a reason that has no name.
        Whatever all ranks raised under its own name.
    In all cases but the last the ranks are ended: they wait for each other and cannot go on.
    """

    def __init__(
        self, ranks: Sequence[Any], step_deadline_s: float, reserved: Reservation | None = None
    ) -> None:
        self._ranks = list(ranks)
        self._deadline_s = step_deadline_s
        self._reserved = reserved

    async def step(self, batch: TrainingBatch) -> Mapping[str, float]:
        """See `DeepSpeedLearner.step`; `batch` is dealt to the ranks."""
        shares = deal(batch, len(self._ranks))
        calls = [rank.step.remote(share) for rank, share in zip(self._ranks, shares, strict=True)]
        metrics: Mapping[str, float] = await self._first(calls)
        return metrics

    async def node_id(self) -> str:
        """Ray's id of the node on which `write_weights` writes."""
        node_id: str = await self._first([self._ranks[0].__ray_call__.remote(_node_id)])
        return node_id

    async def can_share_prompts(self) -> bool:
        """Whether its batches may be packed with shared prompts."""
        answer: bool = await self._first([self._ranks[0].can_share_prompts.remote()])
        return answer

    async def write_weights(self, directory: Path) -> float:
        """Writes the current weights, adapters merged, for the engines; returns the seconds."""
        seconds: float = await self._first(
            [rank.write_weights.remote(str(directory)) for rank in self._ranks]
        )
        return seconds

    async def score_tokens(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each token but the first, at temperature 1: `[T-1]` per sequence."""
        scores: list[list[float]] = await self._first(
            [rank.score_tokens.remote(sequences) for rank in self._ranks]
        )
        return scores

    async def save_policy(self, directory: Path, tokenizer_path: str) -> None:
        """A Hugging Face checkpoint, adapters merged, with the tokenizer of `tokenizer_path`."""
        await self._first(
            [rank.save_policy.remote(str(directory), tokenizer_path) for rank in self._ranks]
        )

    async def save_adapter(self, directory: Path) -> None:
        """The adapter alone in PEFT's format; only for a learner with `lora`."""
        await self._first([rank.save_adapter.remote(str(directory)) for rank in self._ranks])

    async def save_checkpoint(self, directory: Path, version: PolicyVersion) -> None:
        """All that the next step depends on; `directory` is on disk and whole, or not there."""
        await self._first(
            [rank.save_checkpoint.remote(str(directory), version) for rank in self._ranks]
        )

    def stop(self) -> None:
        for rank in self._ranks:
            stop_actor(rank)
        if self._reserved is not None:
            self._reserved.release()

    async def _first(self, calls: Sequence[Any]) -> Any:
        """What rank 0 answers, once all that are asked have; they are the first of the ranks."""
        tasks = [asyncio.ensure_future(_answer(call)) for call in calls]
        try:
            done, waiting = await asyncio.wait(
                tasks, timeout=self._deadline_s, return_when=asyncio.FIRST_EXCEPTION
            )
            if waiting and any(task.exception() for task in done):
                done, waiting = await asyncio.wait(tasks, timeout=GRACE_S)
            failures = {
                rank: task.exception()
                for rank, task in enumerate(tasks)
                if task in done and task.exception() is not None
            }
        finally:
            for task in tasks:
                task.cancel()
        if not waiting and not failures:
            return tasks[0].result()
        agreed = [e for e in failures.values() if isinstance(e, PosttrainError)]
        if len(agreed) == len(tasks):
            raise agreed[0]
        self.stop()
        if not failures:
            late = [rank for rank, task in enumerate(tasks) if task in waiting]
            raise EngineError(
                f"learner ranks {late} were not done after {self._deadline_s:g} s; raise "
                "rl.learner.step_deadline_s if they only need longer"
            )
        raise _named(failures)


def _node_id(_: Any) -> str:
    return this_node()


async def _answer(call: Any) -> Any:
    try:
        return await call
    except RayTaskError as error:
        # What a rank raised arrives as it was raised there, as far as it can be sent.
        raise error.cause or error from error


def _named(failures: Mapping[int, BaseException | None]) -> StageError:
    """Of ranks that failed together one is the cause: the others only lost it."""
    for rank, error in failures.items():
        if isinstance(error, RayActorError):
            return EngineError(f"learner rank {rank} died: {error}")
    for rank, error in failures.items():
        if isinstance(error, PosttrainError):
            return StageError(f"learner rank {rank} failed alone: {error}")
    rank, error = next(iter(failures.items()))
    return StageError(f"learner rank {rank} failed: {type(error).__name__}: {error}")
