"""What stands between the stages and Ray's actors: here without either."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from engine_models import save_policy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.types import PolicyVersion
from posttrain.workers import pools as pools_module
from posttrain.workers import transport, weights
from posttrain.workers.agreement import check_dtype
from posttrain.workers.fingerprint import main_dtype
from posttrain.workers.pools import Pools
from posttrain.workers.settings import (
    ActorResources,
    LearnerResources,
    LearnerSettings,
    RolloutPoolSettings,
)
from rewards.shaping import RewardSettings


@dataclass
class Engines:
    """They note what they are to load, and take what the real ones would take."""

    dtype: str
    loaded: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def check_model(self, facts):
        assert facts.vocab_size == 128

    async def update_weights(self, published):
        check_dtype(main_dtype(published.fingerprint), self.dtype)
        self.loaded.append(load_file(published._directory / "model.safetensors"))


@pytest.fixture
def pools(tmp_path, monkeypatch) -> Pools:
    monkeypatch.setattr(weights, "SHARED_MEMORY", tmp_path / "shm")
    for module in (pools_module, transport):
        monkeypatch.setattr(module, "this_node", lambda: "here")
    return Pools(
        "run",
        rollout=RolloutPoolSettings(),
        judge=RolloutPoolSettings(),
        learner=LearnerResources(),
        rewards=RewardSettings(),
        reward_workers=1,
        reward_judge=RolloutPoolSettings(),
        reward_actor=ActorResources(),
        demands=(),
        deadline_s=1.0,
    )


def saved_as(directory: Path, dtype: str) -> Path:
    policy = save_policy(directory / "fp32", tied=False)
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=getattr(torch, dtype))
    model.save_pretrained(directory / dtype)
    AutoTokenizer.from_pretrained(policy).save_pretrained(directory / dtype)
    return directory / dtype


@pytest.mark.parametrize(
    ("saved", "engine", "sent"),
    [
        ("bfloat16", "float32", "float32"),
        ("float16", "float32", "float32"),
        ("float16", "bfloat16", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float32", "bfloat16", "float32"),
    ],
)
async def test_a_checkpoint_is_served_second_whatever_it_was_saved_in(
    pools, tmp_path, saved, engine, sent
):
    """As vLLM serves any first. The stages before may have trained in another data type."""
    policy = saved_as(tmp_path, saved)
    engines = pools._generators = Engines(engine)
    pools.serves_checkpoint("another")
    assert await pools.serving(str(policy)) is engines
    (state,) = engines.loaded
    expected = load_file(policy / "model.safetensors")
    assert state.keys() == expected.keys()
    assert {tensor.dtype for tensor in state.values()} == {getattr(torch, sent)}
    assert all(torch.equal(state[name], expected[name].to(state[name].dtype)) for name in state)
    assert pools._versions == 1

    await pools.serving(str(policy))  # it is served already
    assert len(engines.loaded) == 1


def test_the_learners_weights_have_a_place_of_their_own(pools, monkeypatch):
    """Where it starts, what an attempt before it left there goes: those of `serving` must stay."""
    asked = {}
    monkeypatch.setattr(
        pools_module, "start_learner", lambda model, _, **given: asked.update(given)
    )
    pools.start_learner(
        "model",
        LearnerSettings(),
        temperature=1.0,
        max_age=1,
        max_tokens=1,
        num_steps=1,
        seed=0,
    )
    assert asked["scratch"] == pools.learner_scratch
    assert pools.scratch in pools.learner_scratch.parents
    assert pools.learner_scratch != pools.scratch / str(PolicyVersion(0, 1))
