"""Losses of a real model on packed batches."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from posttrain.losses.aggregate import Denominators
from posttrain.losses.diagnostics import diagnostic_sums, summarise
from posttrain.losses.objective import OBJECTIVES, policy_loss
from posttrain.losses.settings import LossSettings
from posttrain.packing import pack
from posttrain.types import PolicyVersion, TrainingSample
from posttrain.workers.policy_model import PackedPolicy

TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def model():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        dtype=torch.float32,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    made = []
    prompts = [rng.integers(1, 40, length) for length in (2, 9, 1)]
    for index, length in enumerate([3, 29, 10, 5, 18, 7, 14, 1, 2]):
        prompt = prompts[index % 3]
        mask = np.r_[np.zeros(len(prompt)), np.ones(length)].astype(np.float32)
        length += len(prompt)
        made.append(
            TrainingSample(
                token_ids=np.r_[prompt, rng.integers(1, 40, length - len(prompt))],
                loss_mask=mask,
                rollout_logprobs=mask * rng.uniform(-6, -2, length).astype(np.float32),
                advantages=mask * np.float32(index % 3 - 0.7),
                oldest_version=PolicyVersion(1, 0),
            )
        )
    return made


def packed(samples, row_tokens, micro_tokens, share_prompts=False):
    return pack(
        samples,
        row_tokens=row_tokens,
        micro_tokens=micro_tokens,
        pad_token_id=0,
        current=PolicyVersion(1, 1),
        share_prompts=share_prompts,
    )


def score(model, token_ids, position_ids, sequence_ids=None):
    """Log-probabilities and entropies."""
    policy = PackedPolicy(model, chunk_tokens=16)
    return policy(token_ids, position_ids, TEMPERATURE, sequence_ids)


@pytest.mark.parametrize("share_prompts", [False, True])
@torch.no_grad()
def test_packed_logprobs_equal_separate_ones(model, samples, share_prompts):
    (micro,) = packed(samples, 48, 400, share_prompts).micro_batches
    layout = [
        torch.from_numpy(a) for a in (micro.token_ids, micro.position_ids, micro.sequence_ids)
    ]
    token_ids, _, sequence_ids = layout
    assert token_ids.shape[0] > 1
    assert (sequence_ids < 0).any() == share_prompts
    logprobs, _ = score(model, *layout)
    found = {
        tuple(token_ids[own].tolist()): logprobs[own]
        for own in (
            (sequence_ids == n) & torch.from_numpy(micro.loss_mask).bool()
            for n in range(int(sequence_ids.max()) + 1)
        )
    }
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids)[None]
        alone = score(model, ids, torch.arange(ids.shape[1])[None])[0][0]
        own = sample.loss_mask > 0
        together = found[tuple(sample.token_ids[own].tolist())]
        torch.testing.assert_close(together, alone[torch.from_numpy(own)], atol=1e-5, rtol=0)


def loss_and_gradients(model, batch, settings, reference=None):
    """Those of a step, and its metrics."""
    model.zero_grad()
    over = Denominators(batch.num_loss_tokens, batch.num_sequences, max_tokens=32)
    losses, sums = [], []
    for micro_batch in batch.micro_batches:
        arrays = dataclasses.asdict(micro_batch)
        tensors = {k: torch.from_numpy(a) for k, a in arrays.items() if a is not None}
        ids = [tensors[name] for name in ("token_ids", "position_ids", "sequence_ids")]
        logprobs, entropy = score(model, *ids)
        share = policy_loss(
            logprobs,
            tensors,
            over,
            settings,
            old_logprobs=logprobs.detach(),
            ref_logprobs=score(reference, *ids)[0].detach() if reference else None,
        )
        share.loss.backward()
        losses.append(share.loss.item())
        sums.append(diagnostic_sums(logprobs, entropy, tensors, share, max_age=2))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return sum(losses), gradients, summarise({k: sum(s[k] for s in sums) for k in sums[0]})


def moved(model):
    """A copy whose weights went somewhere else."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_split_changes_neither_loss_nor_gradient(model, samples, kind):
    settings, reference = LossSettings(kind=kind, kl_coefficient=0.1), moved(model)
    # One sequence a micro-batch is what the others have to equal.
    alone = packed(samples, row_tokens=1, micro_tokens=1)
    assert len(alone.micro_batches) == len(samples)
    loss, gradients, metrics = loss_and_gradients(model, alone, settings, reference)
    assert max(g.abs().max() for g in gradients.values()) > 0.01
    assert 0 < metrics["clipped_fraction"] < 1
    assert metrics["ref_kl"] > 0.01
    for row_tokens, micro_tokens, share_prompts in [
        *((40, 400, False), (40, 80, False), (128, 128, False), (16, 64, False)),
        *((40, 400, True), (48, 80, True), (200, 400, True), (16, 64, True)),
    ]:
        batch = packed(samples, row_tokens, micro_tokens, share_prompts)
        other_loss, other, other_metrics = loss_and_gradients(model, batch, settings, reference)
        assert other_loss == pytest.approx(loss, abs=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(other[name], gradient, atol=1e-5, rtol=1e-5)
        assert other_metrics == pytest.approx(metrics, rel=1e-4)


def test_with_an_old_policy_of_its_own_a_step_starts_at_ratio_one(model, samples):
    """The rollouts' policy then weighs tokens, and no ratio meets a bound."""
    batch = packed(samples, row_tokens=40, micro_tokens=80)
    settings = LossSettings(kind="dapo", tis_max=2)
    _, gradients, metrics = loss_and_gradients(model, batch, settings)
    assert metrics["clipped_fraction"] == 0
    # With c_max = 2 the same weights stand in CISPO's gradient: min(π_θ/π_rollout, 2)·A.
    _, same, metrics = loss_and_gradients(model, batch, LossSettings(c_max=2))
    assert 0 < metrics["clipped_fraction"] < 1
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient)
