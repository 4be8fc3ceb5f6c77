"""Architectures whose logits are more than hidden states times the head are found when loaded."""

from pathlib import Path

import pytest
import torch
from engine_models import save_policy
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from posttrain.errors import ModelError
from posttrain.workers.head_check import check_head
from posttrain.workers.policy_model import (
    PackedPolicy,
    check_architecture,
    find_backbone,
    load_model,
)
from posttrain.workers.settings import LearnerSettings, TeacherPoolSettings
from posttrain.workers.teacher import CausalTeacher

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    # Of the checkpoint's tokenizer; theirs are beyond this vocabulary.
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
GEMMA2 = {"head_dim": 16, "query_pre_attn_scalar": 16}


def build(model_type, **changes):
    set_seed(0)
    config = AutoConfig.for_model(model_type, **(SMALL | changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    find_backbone(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
        ("qwen3_moe", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}),
        ("llama", {}),
        ("llama4_text", {"head_dim": 16, "intermediate_size_mlp": 32, "num_local_experts": 2}),
        ("gemma2", {**GEMMA2, "final_logit_softcapping": None}),
        ("granite", {"logits_scaling": 1.0}),
        ("cohere", {"logit_scale": 1.0}),
        ("phi", {}),
        ("gpt2", {"n_embd": 32, "n_head": 2, "n_layer": 1}),
        ("falcon", {}),
        ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 32}),
        ("mamba", {"state_size": 2}),
    ],
)
def test_a_head_that_says_all_is_taken(model_type, changes, dtype):
    model = build(model_type, **changes).to(dtype)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        check_head(model_type, model)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


CHANGED = [
    ("gemma2", GEMMA2),  # capped at 30 by default
    ("granite", {"logits_scaling": 8.0}),
    ("cohere", {}),  # scaled by 1/16 by default
    ("falcon_h1", {"mamba_d_ssm": 32, "mamba_n_heads": 2, "lm_head_multiplier": 0.5}),
]


@pytest.mark.parametrize(("model_type", "changes"), CHANGED)
def test_logits_that_are_changed_afterwards_are_refused(model_type, changes):
    """With random weights a cap would hardly be seen: their logits are small."""
    with pytest.raises(ModelError, match=rf"'{model_type}': .* changes what its head gives"):
        check_head(model_type, build(model_type, **changes))


def save(directory, model_type, **changes):
    """A checkpoint of that architecture with the tokenizer of the tests."""
    save_policy(directory, tied=False)
    build(model_type, **changes).save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize(("model_type", "changes"), CHANGED[:2])
def test_learner_and_teacher_refuse_them_when_they_load(tmp_path, model_type, changes):
    path = save(tmp_path, model_type, **changes)
    with pytest.raises(ModelError, match=r"not supported; take another model"):
        load_model(path, LearnerSettings())
    with pytest.raises(ModelError, match=r"not supported; take another model"):
        CausalTeacher(path, TeacherPoolSettings(), rank=0, address="127.0.0.1:1")


def test_the_learner_refuses_a_head_with_a_bias_and_a_teacher_adds_it(tmp_path):
    path = save(tmp_path, "phi")
    model = load_model(path, LearnerSettings())
    with pytest.raises(ModelError, match=rf"'{path}': the head of PhiForCausalLM has a bias"):
        PackedPolicy(model, chunk_tokens=16)
    CausalTeacher(path, TeacherPoolSettings(), rank=0, address="127.0.0.1:1")


@pytest.mark.parametrize(("model_type", "changes"), [*CHANGED, ("phi", {})])
def test_an_architecture_is_refused_before_its_weights_are_read(tmp_path, model_type, changes):
    path = save(tmp_path, model_type, **changes)
    with pytest.raises(ModelError, match=r"changes what its head gives|has a bias"):
        check_architecture(Path(path))


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
        ("llama", {}),
        ("llama4_text", {"head_dim": 16, "intermediate_size_mlp": 32, "num_local_experts": 2}),
        ("gpt2", {"n_embd": 32, "n_head": 2, "n_layer": 1}),
        ("mamba", {"state_size": 2}),
    ],
)
def test_others_pass_without_their_weights(tmp_path, model_type, changes):
    path = Path(save(tmp_path, model_type, **changes))
    (path / "model.safetensors").unlink()
    check_architecture(path)


def test_what_cannot_compute_without_weights_is_left_to_loading(tmp_path, monkeypatch, capsys):
    """Masks of Llama 4 look into positions, unless its backbone is found and left out."""
    changes = {"head_dim": 16, "intermediate_size_mlp": 32, "num_local_experts": 2}
    path = Path(save(tmp_path, "llama4_text", **changes))
    monkeypatch.setattr("posttrain.workers.policy_model.find_backbone", lambda _: None)
    check_architecture(path)
    assert (
        f"{path}: its head is checked only when its weights are loaded" in capsys.readouterr().err
    )
