"""Architectures in which packed sequences see each other are found before anything is trained."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from posttrain.errors import ModelError
from posttrain.workers.packing_check import check_packing
from posttrain.workers.policy_model import PackedPolicy, can_share_prompts, find_backbone

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


def check(model_type, share_prompts, *, masked=True, **changes):
    set_seed(0)
    config = AutoConfig.for_model(model_type, **(SMALL | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    find_backbone(model)
    policy = PackedPolicy(model, chunk_tokens=64)

    @torch.no_grad()
    def score(batch):
        arrays = (batch.token_ids, batch.position_ids, batch.sequence_ids)
        token_ids, position_ids, sequence_ids = (torch.from_numpy(a) for a in arrays)
        return policy(token_ids, position_ids, 1.0, sequence_ids if masked else None)[0]

    check_packing(
        model_type,
        score,
        vocab_size=config.vocab_size,
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
