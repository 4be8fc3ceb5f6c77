"""Real learners in processes that tests share, and batches for them.

Starting a process takes seconds, starting a learner in one that runs takes a moment.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import numpy as np
import ray
from safetensors.torch import load_file

from posttrain.packing import pack
from posttrain.types import PolicyVersion, TrainingBatch, TrainingSample
from posttrain.workers.cluster import create_actor, stop_actor
from posttrain.workers.learner_actor import LearnerActor
from posttrain.workers.learner_ranks import RemoteLearner
from posttrain.workers.settings import ActorResources, LearnerSettings

TEMPERATURE = 0.7
PROMPT = (17, 90, 4, 61, 33)
MAX_AGE = 2


# Ray's workers cannot import modules of tests.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Host(LearnerActor):
    """A rank that can begin anew."""

    def __init__(self) -> None:
        pass

    def begin(self, address: str, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.ready(address)


class Hosts:
    """`num_ranks` processes with one learner at a time."""

    def __init__(self, num_ranks: int) -> None:
        self._ranks = [
            create_actor(
                Host,
                resources=ActorResources(cpus=0.1),
                environment={"OMP_NUM_THREADS": "1"},
            )
            for _ in range(num_ranks)
        ]
        self._address = ray.get(self._ranks[0].address.remote())

    def begin(
        self, model: Path, settings: LearnerSettings, *, num_steps: int = 20, **keywords: Any
    ) -> RemoteLearner:
        calls = [
            actor.begin.remote(
                self._address,
                str(model),
                settings,
                temperature=TEMPERATURE,
                max_age=MAX_AGE,
                max_tokens=40,
                num_steps=num_steps,
                seed=0,
                rank=rank,
                num_ranks=len(self._ranks),
                **keywords,
            )
            for rank, actor in enumerate(self._ranks)
        ]
        try:
            ray.get(calls, timeout=600)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        return RemoteLearner(self._ranks, settings.step_deadline_s)

    def stop(self) -> None:
        for rank in self._ranks:
            stop_actor(rank)


def random_samples(seed: int, num_samples: int = 7) -> list[TrainingSample]:
    """Sequences of 8 to 40 tokens whose rollout log-probabilities are off enough to clip some;
    prompts are the beginnings of one."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(num_samples):
        prompt, length = int(rng.integers(1, 6)), int(rng.integers(8, 40))
        mask = (np.arange(length) >= prompt).astype(np.float32)
        token_ids = rng.integers(3, 128, length)
        token_ids[:prompt] = PROMPT[:prompt]
        samples.append(
            TrainingSample(
                token_ids=token_ids,
                loss_mask=mask,
                rollout_logprobs=mask * rng.uniform(-9, -4, length).astype(np.float32),
                advantages=mask * np.float32(rng.normal()),
                oldest_version=PolicyVersion(1, int(rng.integers(3, 6))),
            )
        )
    return samples


def poisoned_samples() -> list[TrainingSample]:
    """One of seven sequences has an advantage that is no number."""
    *others, last = random_samples(99)
    poisoned = TrainingSample(
        token_ids=last.token_ids,
        loss_mask=last.loss_mask,
        rollout_logprobs=last.rollout_logprobs,
        advantages=last.loss_mask * np.float32("nan"),
        oldest_version=last.oldest_version,
    )
    return [*others, poisoned]


def batch_of(
    samples: list[TrainingSample], *, micro_tokens: int, share_prompts: bool = False
) -> TrainingBatch:
    return pack(
        samples,
        row_tokens=64,
        micro_tokens=micro_tokens,
        pad_token_id=0,
        current=PolicyVersion(1, 5),
        share_prompts=share_prompts,
    )


def train(learner: RemoteLearner, seeds: range, *, micro_tokens: int = 64) -> list[Any]:
    """The metrics of one step per seed, on batches with shared prompts."""
    batches = [
        batch_of(random_samples(seed), micro_tokens=micro_tokens, share_prompts=True)
        for seed in seeds
    ]
    return [asyncio.run(learner.step(batch)) for batch in batches]


def published(learner: RemoteLearner, directory: Path) -> dict[str, Any]:
    """What the engines would load."""
    asyncio.run(learner.write_weights(directory))
    return load_file(directory / "model.safetensors")


def largest_difference(first: dict[str, Any], second: dict[str, Any]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)
