"""An adapter in the learner: what leaves is merged, what is trained stays, the base is at hand."""

import asyncio
import hashlib

import numpy as np
import pytest
import ray
import torch
from engine_models import save_policy
from learner_hosts import (
    TEMPERATURE,
    batch_of,
    largest_difference,
    published,
    random_samples,
    train,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM

from posttrain.errors import SettingsError
from posttrain.losses.settings import LossSettings
from posttrain.workers.settings import LearnerSettings, LoraSettings
from posttrain.workers.weights import read_checkpoint

pytest_plugins = ["engine_fixtures", "learner_fixtures"]
pytestmark = pytest.mark.engine

FULL = LearnerSettings(
    learning_rate=1e-2, loss=LossSettings(kl_coefficient=0.1), logprob_chunk_tokens=16
)
LORA = LoraSettings(r=4, alpha=8)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("lora") / "policy", tied=True)


def trained_bytes(hosts):
    """A hash of every parameter of rank 0, bit by bit."""

    def digest(actor):
        sha = hashlib.sha256()
        for name, tensor in sorted(actor._running._model.state_dict().items()):
            sha.update(name.encode() + tensor.detach().numpy().tobytes())
        return sha.hexdigest()

    return ray.get(hosts._ranks[0].__ray_call__.remote(digest))


def test_what_leaves_is_merged_and_what_is_trained_stays(one_rank, policy, tmp_path):
    learner = one_rank.begin(policy, FULL, lora=LORA)
    base = read_checkpoint(policy)
    assert largest_difference(published(learner, tmp_path / "untrained"), base) == 0
    train(learner, range(3))
    before = trained_bytes(one_rank)
    weights = published(learner, tmp_path / "trained")
    asyncio.run(learner.save_policy(tmp_path / "policy", str(policy)))
    asyncio.run(learner.save_adapter(tmp_path / "adapter"))
    assert trained_bytes(one_rank) == before

    # PEFT merges the adapter that it reads to the same weights.
    plain = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    merged = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).merge_and_unload()
    state = {name: tensor.detach() for name, tensor in merged.state_dict().items()}
    assert largest_difference(state, weights) < 1e-6
    assert largest_difference(read_checkpoint(tmp_path / "policy"), weights) == 0
    changed = {name for name in base if not torch.equal(base[name], weights[name])}
    linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert changed == {name for name in base if name.split(".")[-2] in linear}


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "full"])
def test_the_reference_is_the_policy_that_entered(one_rank, policy, tmp_path, lora):
    learner = one_rank.begin(policy, FULL, lora=lora)
    first, *_ = train(learner, range(2))
    assert first["ref_kl"] == 0
    weights = published(learner, tmp_path / "weights")
    samples = random_samples(2)
    batch = batch_of(samples, micro_tokens=64, share_prompts=True)
    metrics = asyncio.run(learner.step(batch))
    assert metrics["ref_kl"] == pytest.approx(k3_by_hand(policy, weights, samples), rel=1e-3)
    assert metrics["ref_kl"] > 1e-4


def k3_by_hand(policy, weights, samples):
    """Mean over tokens, each sequence on its own."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)

    def logprobs():
        scored = []
        for sample in samples:
            ids = torch.from_numpy(sample.token_ids)
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1] / TEMPERATURE
            token = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            scored.append(token[torch.from_numpy(sample.loss_mask[1:]) > 0])
        return torch.cat(scored).double().numpy()

    with torch.no_grad():
        reference = logprobs()
        model.load_state_dict(weights)
        difference = reference - logprobs()
    return float(np.mean(np.exp(difference) - difference - 1))


@pytest.mark.parametrize(
    ("target", "message"),
    [("attention", "Target modules .*attention.* not found"), ("embed_tokens", "an embedding")],
)
def test_an_adapter_that_cannot_be_placed_is_refused(one_rank, policy, target, message):
    lora = LoraSettings(target_modules=(target,))
    with pytest.raises(SettingsError, match=rf"policy.lora.target_modules.*{message}"):
        one_rank.begin(policy, FULL, lora=lora)
