"""A toy policy learns in the loop, in lock-step and asynchronously."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from online_fakes import (
    World,
    loop_settings,
    make_reward,
)

from posttrain.types import (
    GenerationRequest,
    PolicyVersion,
    Prompt,
    Reward,
    Rollout,
    SystemInstruction,
    TrainingBatch,
    VersionSpan,
)


class Bandit:
    """Three-armed bandits: generator, scorer, learner and publisher of one small softmax policy.

    Prompt token s picks the bandit, completion token a the arm; arm (s+1) mod 3 pays.
    """

    def __init__(self, seed: int, learning_rate: float = 0.2) -> None:
        self._rng = np.random.default_rng(seed)
        self._learning_rate = learning_rate
        self.weights = np.zeros((3, 3))
        self.served_weights = self.weights.copy()
        self.served = PolicyVersion(0, 0)

    async def generate(self, request: GenerationRequest) -> tuple[Rollout, ...]:
        logits = self.served_weights[request.prompt_token_ids[0]]
        version = self.served
        probabilities = np.exp(logits) / np.exp(logits).sum()
        await asyncio.sleep(float(self._rng.uniform(0.5, 1.5)))
        arms = self._rng.choice(3, size=request.num_rollouts, p=probabilities)
        return tuple(
            Rollout(
                rollout_id=f"{request.request_id}/{i}",
                draw_id=request.request_id,
                prompt_token_ids=request.prompt_token_ids,
                completion_token_ids=(int(arm),),
                rollout_logprobs=(math.log(probabilities[arm]),),
                text=str(arm),
                finish_reason="stop",
                version_spans=(VersionSpan(0, 1, version),),
            )
            for i, arm in enumerate(arms)
        )

    async def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], system: SystemInstruction | None
    ) -> tuple[Reward, ...]:
        state = rollouts[0].prompt_token_ids[0]
        return tuple(make_reward("1" if int(r.text) == (state + 1) % 3 else "0") for r in rollouts)

    async def step(self, batch: TrainingBatch) -> Mapping[str, float]:
        await asyncio.sleep(1.0)
        gradient = np.zeros_like(self.weights)
        for micro in batch.micro_batches:
            for row, column in zip(*np.nonzero(micro.loss_mask), strict=True):
                state, arm = micro.token_ids[row, column - 1], micro.token_ids[row, column]
                soft = np.exp(self.weights[state]) / np.exp(self.weights[state]).sum()
                ratio = min(soft[arm] / np.exp(micro.rollout_logprobs[row, column]), 5.0)
                direction = np.eye(3)[arm] - soft
                gradient[state] += ratio * micro.advantages[row, column] * direction
        self.weights += self._learning_rate * gradient
        return {}

    async def publish(self, version: PolicyVersion) -> Mapping[str, float]:
        self.served_weights, self.served = self.weights.copy(), version
        return {}


def _train_bandit(max_lag: int, seed: int = 0) -> tuple[list[float], Bandit]:
    bandit = Bandit(seed)
    world = World(
        loop_settings(
            num_steps=25, group_size=4, groups_per_step=3, max_lag=max_lag, starvation_draws=999
        ),
        bandit,
        scorer=bandit,
        learner=bandit,
        publisher=bandit,
        encode=lambda prompt, system: (int(prompt.prompt_id[1:]) % 3,),
    )
    world.run()
    return [record.metrics["reward_mean"] for record in world.records], bandit


@pytest.mark.parametrize("max_lag", [0, 2])
def test_reward_rises(max_lag: int) -> None:
    rewards, bandit = _train_bandit(max_lag)
    assert 0.15 < np.mean(rewards[:3]) < 0.55
    assert np.mean(rewards[-3:]) > 0.9
    assert [int(row.argmax()) for row in bandit.weights] == [1, 2, 0]


def test_lock_step_is_deterministic_for_a_seed() -> None:
    first, second, other = (_train_bandit(0, seed) for seed in (5, 5, 6))
    assert first[0] == second[0]
    assert np.array_equal(first[1].weights, second[1].weights)
    assert first[0] != other[0]
