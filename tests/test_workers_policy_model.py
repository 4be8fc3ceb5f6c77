"""What the learner can load, and what it refuses before anything is trained."""

import json

import pytest
import torch
from engine_models import save_policy
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.errors import ModelError
from posttrain.workers.policy_model import can_share_prompts, load_model, model_fingerprint
from posttrain.workers.settings import LearnerSettings


@pytest.fixture
def policy(tmp_path):
    return save_policy(tmp_path / "policy", tied=False)


def change_config(policy, **changes):
    file = policy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def drop_a_tensor(policy):
    file = policy / "model.safetensors"
    state = load_file(file)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, file, metadata={"format": "pt"})


def cut_short(policy):
    file = policy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_a_tensor, r"lacks 1 of the model's tensors, .*model.layers.1.mlp.up_proj.weight"),
        (cut_short, r"transformers cannot load"),
        (lambda p: change_config(p, model_type="quill"), r"transformers cannot load.*quill"),
        (
            lambda p: change_config(p, intermediate_size=96),
            r"cannot load.*\.0\.mlp\.down_proj\.weight has the size \[64, 128\], and .* \[64, 96\]",
        ),
        (lambda p: (p / "tokenizer.json").unlink(), r"transformers cannot load"),
        (lambda p: (p / "config.json").unlink(), r"transformers cannot load"),
    ],
    ids=["tensor", "short", "architecture", "shape", "tokenizer", "config"],
)
def test_a_model_that_cannot_be_loaded_is_refused_with_the_reason(policy, spoil, message):
    spoil(policy)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(policy), LearnerSettings())
    assert str(policy) in str(caught.value)


def test_a_tokenizer_with_tokens_that_the_model_does_not_know_is_refused(policy):
    file = policy / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 128, "content": "<new>"})
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"'<new>' the id 128, but the model has 128 embeddings"):
        load_model(str(policy), LearnerSettings())


def test_a_model_in_training_computes_what_it_computes_in_evaluation(policy):
    change_config(policy, attention_dropout=0.5)
    model = load_model(str(policy), LearnerSettings())
    assert model.training
    plain = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)


def test_a_mixture_in_training_computes_what_it_computes_in_evaluation(policy):
    """Its router would see inputs that jitter."""
    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=128,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        router_jitter_noise=0.5,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(policy)
    model = load_model(str(policy), LearnerSettings())
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        noiseless = model(ids).logits
        torch.testing.assert_close(model.eval()(ids).logits, noiseless)


def test_the_fingerprint_tells_policies_apart_and_knows_them_elsewhere(tmp_path):
    settings = LearnerSettings()
    first, again, other = (
        model_fingerprint(
            load_model(str(save_policy(tmp_path / name, tied=True, seed=seed)), settings)
        )
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first == again != other


SMALL = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("model_type", "changes", "shares"),
    [
        ("qwen3", {"head_dim": 8}, True),
        ("llama", {}, True),
        ("mistral", {"sliding_window": None}, True),
        ("mistral", {"sliding_window": 8}, False),
        ("llama4_text", {"head_dim": 8, "intermediate_size_mlp": 16}, False),  # chunks
        ("gemma2", {"head_dim": 8}, False),  # windows in every second layer
        ("gpt2", {"n_embd": 16, "n_head": 2, "n_layer": 1}, False),  # learnt positions
        ("falcon", {"alibi": True}, False),  # positions made from the mask
        ("mamba", {"state_size": 2}, False),
        ("falcon_h1", {"head_dim": 8, "mamba_d_ssm": 16, "mamba_n_heads": 2}, False),  # half of it
    ],
)
def test_prompts_are_shared_where_a_mask_says_all(model_type, changes, shares):
    config = AutoConfig.for_model(model_type, **(SMALL | changes))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert can_share_prompts(model) == shares
