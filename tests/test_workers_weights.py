"""Weights as files: names, values, leftovers. No engine is started."""

import json

import pytest
import torch
from engine_models import save_policy
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from posttrain.errors import ModelError
from posttrain.workers import weights
from posttrain.workers.fingerprint import fingerprint
from posttrain.workers.weights import (
    clear_leftovers,
    clear_scratch,
    read_checkpoint,
    read_fingerprint,
    remove_weights,
    scratch_directory,
    with_lm_head,
    write_weights,
)

EMBEDDING = "model.embed_tokens.weight"


def test_a_tied_head_is_named_beside_its_embedding():
    embedding = torch.arange(6.0).view(3, 2)
    state = {EMBEDDING: embedding, "model.norm.weight": torch.ones(2)}
    named = with_lm_head(state, tied=True)
    assert named.keys() == {EMBEDDING, "model.norm.weight", "lm_head.weight"}
    assert torch.equal(named["lm_head.weight"], embedding)
    assert named["lm_head.weight"].data_ptr() != embedding.data_ptr()  # safetensors refuses that
    assert "lm_head.weight" not in state


def test_an_untied_head_stays_as_it_is():
    state = {EMBEDDING: torch.zeros(3, 2), "lm_head.weight": torch.ones(3, 2)}
    named = with_lm_head(state, tied=False)
    assert named.keys() == state.keys()
    assert all(named[name] is state[name] for name in state)


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_is_read_as_an_engine_wants_it_and_written_back(tied, tmp_path):
    policy = save_policy(tmp_path / "policy", tied=tied)
    assert ("lm_head.weight" in load_file(policy / "model.safetensors")) is not tied
    state = read_checkpoint(policy)
    expected = AutoModelForCausalLM.from_pretrained(policy).state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert torch.equal(state["lm_head.weight"], state[EMBEDDING]) is tied

    written = tmp_path / "scratch" / "1.7"
    write_weights(state, written)
    back = load_file(written / "model.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert read_fingerprint(written) == fingerprint(state.items())
    remove_weights(written)
    assert not written.exists()


def test_a_checkpoint_in_several_files_is_read_whole(tmp_path):
    policy = save_policy(tmp_path / "policy", tied=False)
    AutoModelForCausalLM.from_pretrained(policy).save_pretrained(
        tmp_path / "sharded", max_shard_size="100KB"
    )
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    whole, sharded = read_checkpoint(policy), read_checkpoint(tmp_path / "sharded")
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


def test_a_tied_head_is_found_whatever_its_embedding_is_called(tmp_path):
    config = GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    # As checkpoints of older versions are: a default is not written down.
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    written.pop("tie_word_embeddings", None)
    file.write_text(json.dumps(written))
    state = read_checkpoint(tmp_path)
    assert torch.equal(state["lm_head.weight"], state["transformer.wte.weight"])


def test_an_embedding_is_told_from_others_by_its_whole_name(tmp_path):
    policy = save_policy(tmp_path / "policy", tied=True)
    file = policy / "model.safetensors"
    state = load_file(file)
    embedding = state.pop(EMBEDDING)
    state["model.layers.7.embed_tokens.weight"] = torch.zeros(2, 2)
    state["model.position_embeddings.weight"] = torch.zeros(2, 2)
    state["language_model.embed_tokens.weight"] = embedding
    save_file(state, file, metadata={"format": "pt"})
    assert torch.equal(read_checkpoint(policy)["lm_head.weight"], embedding)

    del state["model.layers.7.embed_tokens.weight"], state["language_model.embed_tokens.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=rf"{policy}/config.json ties the head .*embed_tokens, wte"
    ):
        read_checkpoint(policy)


def test_a_directory_without_weights_is_named(tmp_path):
    with pytest.raises(ModelError, match=rf"{tmp_path} holds no safetensors"):
        read_checkpoint(tmp_path)


def test_a_written_version_is_never_overwritten(tmp_path):
    write_weights({"a": torch.ones(1)}, tmp_path / "1.1")
    with pytest.raises(FileExistsError):
        write_weights({"a": torch.zeros(1)}, tmp_path / "1.1")


def test_a_view_is_written_with_its_own_values(tmp_path):
    """safetensors writes contiguous memory: a transposed view must not come back untransposed."""
    write_weights({"a": torch.arange(6.0).view(2, 3).T}, tmp_path / "1")
    back = load_file(tmp_path / "1" / "model.safetensors")["a"]
    assert back.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


def test_only_the_own_leftovers_are_cleared(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARED_MEMORY", tmp_path)
    mine, other = scratch_directory("mine"), scratch_directory("other")
    assert mine == tmp_path / "posttrain-mine"
    assert clear_scratch("mine") is False
    write_weights({"a": torch.ones(1)}, mine / "1.1")
    write_weights({"a": torch.ones(1)}, other / "1.1")
    assert clear_scratch("mine") is True
    assert not mine.exists()
    assert (other / "1.1" / "model.safetensors").exists()
    assert [clear_leftovers(other / "1.1"), clear_leftovers(other / "1.1")] == [True, False]
    assert other.exists()
