"""Fixtures of the tests that touch Ray: `pytest_plugins = ["engine_fixtures"]`."""

from __future__ import annotations

import asyncio
import itertools
from functools import partial

import pytest
from engine_models import (
    MAX_MODEL_LEN,
    PROBES,
    TEMPERATURE,
    request,
    save_moe_policy,
    save_policy,
)

from posttrain.advantages import group_to_samples
from posttrain.packing import pack
from posttrain.types import Message, Outcome, PolicyVersion, Prompt, Reward, RolloutGroup
from posttrain.workers.cluster import connect, disconnect
from posttrain.workers.generator import GeneratorPool
from posttrain.workers.learner_ranks import start_learner
from posttrain.workers.probe import ProbeSequence
from posttrain.workers.publisher import WeightPublisher
from posttrain.workers.settings import (
    ActorResources,
    EngineSettings,
    LearnerResources,
    LearnerSettings,
    LoraSettings,
    PublishSettings,
)


@pytest.fixture(scope="session")
def cluster():
    """Ray on this machine, one for all modules: starting it takes seconds."""
    connect()
    yield
    disconnect()


class Stack:
    """One engine and one learner that started from the same checkpoint."""

    def __init__(self, policy, generators, learner, scratch):
        self.policy = policy
        self.generators = generators
        self.learner = learner
        self.scratch = scratch
        self._versions = itertools.count(1)

    def next_version(self):
        return PolicyVersion(1, next(self._versions))

    def publisher(self, learner=None, **settings):
        return WeightPublisher(
            learner or self.learner,
            self.generators,
            model=self.policy,
            scratch=self.scratch,
            probes=[ProbeSequence(tuple(ids), num_prompt_tokens=1) for ids in PROBES],
            settings=PublishSettings(**settings),
        )

    async def scores(self, sequences):
        """(the learner's, the engine's) log-probabilities."""
        learned = await self.learner.score_tokens(sequences)
        (served,) = await self.generators.score_tokens(sequences, f"test-{next(self._versions)}")
        return learned, served

    async def train_on(self, rollouts):
        """One step in which every other answer was right."""
        rewards = [
            Reward(
                value=float(right),
                correctness=float(right),
                outcome=Outcome.CORRECT if right else Outcome.WRONG,
            )
            for right in itertools.islice(itertools.cycle((True, False)), len(rollouts))
        ]
        group = RolloutGroup(
            draw_id="draw",
            prompt=Prompt(
                prompt_id="p",
                messages=(Message(role="user", content="the"),),
                reference=None,
                domain="toy",
            ),
            system=None,
            sampling=request("", "", num_rollouts=1, max_tokens=1).sampling,
            rollouts=tuple(rollouts),
            rewards=tuple(rewards),
        )
        batch = pack(
            group_to_samples(group, "mean"),
            row_tokens=MAX_MODEL_LEN,
            micro_tokens=1024,
            pad_token_id=0,
            current=rollouts[0].oldest_version,
        )
        return await self.learner.step(batch)


LORA = LoraSettings(r=8)
STACKS = {
    "tied": (partial(save_policy, tied=True), None),
    "untied": (partial(save_policy, tied=False), None),
    "experts": (save_moe_policy, None),  # its head is a tensor of its own, too
    "tied-lora": (partial(save_policy, tied=True), LORA),
    "untied-lora": (partial(save_policy, tied=False), LORA),
}
"""How the policy is written, and the adapter that is trained on it, merged on its way out."""


@pytest.fixture(
    scope="session",
    params=[
        "tied",
        *(pytest.param(name, marks=pytest.mark.slow) for name in STACKS if name != "tied"),
    ],
)
def stack(request, cluster, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    save, lora = STACKS[request.param]
    policy = save(directory / "policy")
    resources = ActorResources(cpus=0.25)
    # One after the other: Ray now and then loses an actor that two threads start at once.
    learner = start_learner(
        str(policy),
        LearnerSettings(learning_rate=3e-2),
        temperature=TEMPERATURE,
        max_age=1,
        max_tokens=40,
        num_steps=100,
        seed=0,
        lora=lora,
        checkpoint=None,
        resources=LearnerResources(cpus=0.25),
        deadline_s=240,
    )
    generators = asyncio.run(
        GeneratorPool.start(
            str(policy),
            PolicyVersion(1, 0),
            EngineSettings(max_model_len=MAX_MODEL_LEN, max_num_seqs=64),
            replicas=1,
            resources=resources,
            deadline_s=240,
        )
    )
    scratch = directory / "scratch"
    scratch.mkdir()
    yield Stack(policy, generators, learner, scratch)
    generators.stop()
    learner.stop()
