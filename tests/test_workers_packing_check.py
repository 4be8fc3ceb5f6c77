"""Architectures in which packed sequences see each other, or that are noisy in training, are found
before anything is trained."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from posttrain.errors import ModelError
from posttrain.workers.packing_check import check_noise, check_packing
from posttrain.workers.policy_model import (
    PackedPolicy,
    _switch_off_noise,
    can_share_prompts,
    find_backbone,
)

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


def build(model_type, **changes):
    set_seed(0)
    config = AutoConfig.for_model(model_type, **(SMALL | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    find_backbone(model)
    return model


def scorer(model, *, masked=True, training=False):
    policy = PackedPolicy(model, chunk_tokens=64)

    @torch.no_grad()
    def score(batch):
        policy.train(training)
        arrays = (batch.token_ids, batch.position_ids, batch.sequence_ids)
        token_ids, position_ids, sequence_ids = (torch.from_numpy(a) for a in arrays)
        return policy(token_ids, position_ids, 1.0, sequence_ids if masked else None)[0]

    return score


def check(model_type, share_prompts, *, masked=True, **changes):
    model = build(model_type, **changes)
    check_packing(
        model_type,
        scorer(model, masked=masked),
        vocab_size=model.config.vocab_size,
        dtype="float32",
        share_prompts=can_share_prompts(model) and share_prompts,
    )


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen3", {"head_dim": 16}),
        ("llama", {}),
        ("mistral", {"sliding_window": 4}),
        # With its cap on the logits the learner refuses it (see test_workers_head_check.py).
        (
            "gemma2",
            {"head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": None},
        ),
    ],
)
def test_sequences_stay_apart(model_type, changes, share_prompts):
    check(model_type, share_prompts, **changes)


@pytest.mark.parametrize("share_prompts", [False, True])
def test_falcon_hands_no_positions_to_its_attention(share_prompts):
    with pytest.raises(ModelError, match=r"'falcon'.*see each other"):
        check("falcon", share_prompts)


def test_a_shared_prompt_without_its_mask_is_noticed():
    check("llama", share_prompts=False, masked=False)
    with pytest.raises(ModelError, match="see each other"):
        check("llama", share_prompts=True, masked=False)


def compare_modes(model):
    check_noise(
        "noisy",
        scorer(model),
        scorer(model, training=True),
        vocab_size=model.config.vocab_size,
        dtype="float32",
    )


MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"attention_dropout": 0.5}),
        ("mixtral", {**MIXTURE, "router_jitter_noise": 0.5}),
        ("phimoe", {**MIXTURE, "input_jitter_noise": 0.5}),  # hardly any of its experts are tied
    ],
)
def test_noise_that_can_be_switched_off_is(model_type, changes):
    model = build(model_type, **changes)
    with pytest.raises(ModelError, match="in training this architecture computes other"):
        compare_modes(model)
    _switch_off_noise(model)
    compare_modes(model)


def test_experts_that_are_drawn_at_random_in_training_are_noticed():
    """As far as they are nearly tied, which this threshold takes all of them for."""
    model = build("phimoe", **MIXTURE, router_jitter_noise=100.0)
    _switch_off_noise(model)
    with pytest.raises(ModelError, match=r"'noisy': in training .* cannot train it"):
        compare_modes(model)
