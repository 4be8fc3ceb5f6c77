"""The critic of `posttrain prune`: a checkpoint, or an adapter on one, served by engine pools."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from posttrain.config import ResourceSettings
from posttrain.data.chat import ChatFormat
from posttrain.errors import ModelError
from posttrain.inputs import check_context, locate_model, locate_reward_models
from posttrain.prune.critic import Critic, CriticModel, OpenCritic
from posttrain.prune.settings import PruneSettings
from posttrain.run_dir import fingerprint_directory
from posttrain.workers.adapters import base_of, check_adapter, is_adapter, merge_adapter
from posttrain.workers.demand import Demand
from posttrain.workers.pools import Pools


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticFiles:
    """A checkpoint directory, and the PEFT adapter that is merged into it, if there is one."""

    base: Path
    adapter: Path | None

    @property
    def fingerprint(self) -> str:
        base = fingerprint_directory(self.base)
        if self.adapter is None:
            return base
        both = f"{base} {fingerprint_directory(self.adapter)}"
        return hashlib.sha256(both.encode()).hexdigest()

    @property
    def tokenizer(self) -> Path:
        """Training may have left one beside the adapter."""
        if self.adapter is not None and (self.adapter / "tokenizer_config.json").exists():
            return self.adapter
        return self.base


def locate_critic(name: str) -> CriticFiles:
    """A checkpoint directory, a hub name, `starter`, or the directory of a PEFT adapter.

    Raises ModelError if nothing can be read there, or the adapter does not say what it is for.
    """
    adapter = Path(name)
    if not is_adapter(adapter):
        return CriticFiles(base=locate_model(name), adapter=None)
    base = locate_model(base_of(adapter))
    check_adapter(adapter, base)
    return CriticFiles(base=base, adapter=adapter)


def critic_model(name: str, max_length: int) -> CriticModel:
    """What judging needs to know of the critic before it is served. Raises ModelError, also if it
    takes fewer than `max_length` tokens."""
    try:
        files = locate_critic(name)
        chat = ChatFormat(str(files.tokenizer))
    except ModelError as error:  # a run calls it otherwise
        raise ModelError(f"--model: {str(error).removeprefix('policy.model: ')}") from error
    check_context(files.base, max_length, "--max-length")
    return CriticModel(name=name, fingerprint=files.fingerprint, chat=chat)


def with_located_models(settings: PruneSettings) -> PruneSettings:
    """With directories for the names of judge and reward model. Raises ModelError."""
    return settings.model_copy(update={"rewards": locate_reward_models(settings.rewards)})


def critic_opener(settings: PruneSettings, out: Path) -> OpenCritic:
    """Engines and scorers for as long as they are asked. `settings` name models of rewards by
    directory, `out` names what is left in shared memory should the process be killed."""

    @asynccontextmanager
    async def open_critic() -> AsyncIterator[Critic]:
        files = locate_critic(settings.critic.model)
        with _pools(settings, out) as pools:
            model = files.base
            if files.adapter is not None:
                model = pools.scratch / "merged"
                merge_adapter(files.base, files.adapter, model, files.tokenizer)
            generators = await pools.serving(str(model))
            yield Critic(
                generator=generators,
                scorer=pools.scorer,
                score_tokens=generators.score_tokens_once,
            )

    return open_critic


def demands(settings: PruneSettings) -> list[Demand]:
    """The actors that are up at the same time, as `posttrain.roles.demands` of a run."""
    rollout, scoring = settings.resources.rollout, settings.resources.rewards
    roles = [
        Demand(role="critic", count=rollout.replicas, each=rollout.actor),
        Demand(role="rewards", count=1, each=scoring.actor),
    ]
    if "judge" in settings.rewards.models:
        judge = scoring.judge
        roles.append(Demand(role="rewards.judge", count=judge.replicas, each=judge.actor))
    return roles


def _pools(settings: PruneSettings, out: Path) -> Pools:
    resources = settings.resources
    rollout = resources.rollout.as_long_as(settings.critic.max_length)
    return Pools(
        hashlib.sha256(str(out.absolute()).encode()).hexdigest()[:12],
        rollout=rollout,
        judge=rollout,
        learner=ResourceSettings().learner,
        rewards=settings.rewards,
        reward_workers=resources.rewards.workers,
        reward_judge=resources.rewards.judge,
        reward_actor=resources.rewards.actor,
        demands=demands(settings),
        deadline_s=resources.deadline_s,
    )
