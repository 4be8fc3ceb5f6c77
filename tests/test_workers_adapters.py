"""Adapters in PEFT's format: whose they are, and several of them as one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import save_moe_policy, save_policy
from huggingface_hub import constants
from learner_hosts import largest_difference
from peft import PeftModel
from transformers import AutoModelForCausalLM

from posttrain.errors import ModelError, SettingsError
from posttrain.inputs import locate_model
from posttrain.run_dir import fingerprint_directory
from posttrain.workers.adapters import (
    BASE,
    base_of,
    check_adapter,
    check_targets,
    is_adapter,
    merge_adapter,
    stack_adapters,
)
from posttrain.workers.policy_model import add_adapter
from posttrain.workers.settings import LoraSettings

LORA = LoraSettings(r=4, alpha=12, target_modules=("q_proj", "down_proj"))


def weights(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def make_adapter(base: Path, target: Path, seed: int, settings: LoraSettings = LORA) -> Path:
    """With weights as training would leave them."""
    adapted = add_adapter(AutoModelForCausalLM.from_pretrained(base), settings)
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("adapters") / "base", tied=True)


@pytest.fixture
def adapter(base, tmp_path):
    return make_adapter(base, tmp_path / "adapter", seed=1)


def test_adapters_trained_one_on_another_become_one(base, tmp_path):
    first = make_adapter(base, tmp_path / "first", seed=1)
    merge_adapter(base, first, tmp_path / "after first", base)
    second = make_adapter(tmp_path / "after first", tmp_path / "second", seed=2)
    merge_adapter(tmp_path / "after first", second, tmp_path / "after both", base)
    stack_adapters([first, second], base, "someone/base", tmp_path / "both")

    both = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(tmp_path / "both")
    ).merge_and_unload()
    found = {name: tensor.detach() for name, tensor in both.state_dict().items()}
    assert largest_difference(found, weights(tmp_path / "after both")) < 1e-6
    assert largest_difference(found, weights(tmp_path / "after first")) > 1e-2
    config = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (8, "someone/base")
    assert (tmp_path / "both" / "tokenizer_config.json").exists()
    assert not (tmp_path / "both" / "config.json").exists()
    check_adapter(tmp_path / "both", base)


def test_one_adapter_alone_stays_what_it_was(base, adapter, tmp_path):
    stack_adapters([adapter], base, str(base), tmp_path / "stacked")
    for source, target in ((adapter, "as it was"), (tmp_path / "stacked", "stacked alone")):
        merge_adapter(base, source, tmp_path / target, base)
    assert (
        largest_difference(weights(tmp_path / "as it was"), weights(tmp_path / "stacked alone"))
        < 1e-6
    )


def test_what_is_stacked_already_stays_until_it_would_be_another(base, adapter, tmp_path):
    stacked = tmp_path / "stacked"

    def stacks_again(*adapters: Path, named: str = "someone/base") -> bool:
        if stacked.exists():
            (stacked / "README.md").write_text("card")
        stack_adapters(adapters, base, named, stacked)
        return not (stacked / "README.md").exists()

    assert stacks_again(adapter)
    assert not stacks_again(adapter)
    assert stacks_again(adapter, named="other/base")
    other = make_adapter(base, tmp_path / "other", seed=2)
    assert stacks_again(adapter, other)
    assert stacks_again(other, adapter)
    make_adapter(base, adapter, seed=3)
    assert stacks_again(other, adapter)
    weights_file = stacked / "adapter_model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:50])
    assert stacks_again(other, adapter)
    assert not stacks_again(other, adapter)
    check_adapter(stacked, base)


def test_a_policy_may_be_an_adapter(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    assert is_adapter(adapter)
    assert base_of(adapter) == str(base)
    merged = locate_model(str(adapter))
    merge_adapter(base, adapter, tmp_path / "by hand", base)
    assert largest_difference(weights(merged), weights(tmp_path / "by hand")) == 0
    before = fingerprint_directory(merged)
    assert locate_model(str(adapter)) == merged
    assert fingerprint_directory(merged) == before


def test_an_adapter_for_another_base_is_refused(base, adapter, tmp_path):
    wider = tmp_path / "wider"
    shutil.copytree(base, wider)
    config = wider / "config.json"
    changed = json.loads(config.read_text()) | {"intermediate_size": 96}
    config.write_text(json.dumps(changed))
    with pytest.raises(ModelError, match=r"down_proj has 64 × 128 weights; in .*wider.* 64 × 96"):
        check_adapter(adapter, wider)
    shallow = json.loads(config.read_text()) | {"intermediate_size": 128, "num_hidden_layers": 1}
    config.write_text(json.dumps(shallow | {"layer_types": ["full_attention"]}))
    with pytest.raises(ModelError, match=r"adapts model.layers.1.* does not have: .*another base"):
        check_adapter(adapter, wider)


def test_an_adapter_of_ours_knows_its_base_by_its_weights(base, adapter, tmp_path):
    stack_adapters([adapter], base, str(base), tmp_path / "stacked")
    other = save_policy(tmp_path / "other", tied=True, seed=5)
    check_adapter(adapter, other)  # the same shapes, and nothing else is known of it
    with pytest.raises(ModelError, match=r"trained on another policy than .*other.*restore its"):
        check_adapter(tmp_path / "stacked", other)
    assert (tmp_path / "stacked" / BASE).exists()


def test_an_adapter_that_names_no_base_or_is_damaged_is_refused(base, adapter):
    weights_file = adapter / "adapter_model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:50])
    with pytest.raises(ModelError, match="cannot be read"):
        check_adapter(adapter, base)
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="names no base model"):
        locate_model(str(adapter))


def test_layers_to_adapt_are_checked_without_weights(base, tmp_path):
    for file in ("config.json", "generation_config.json"):
        (tmp_path / file).write_text((base / file).read_text())
    check_targets(tmp_path, LORA)
    wrong = LoraSettings(target_modules=("attention",))
    with pytest.raises(SettingsError, match=r"policy\.lora\.target_modules = \('attention',\)"):
        check_targets(tmp_path, wrong)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "gate_proj", "up_proj", "down_proj")])
def test_an_adapter_that_would_reach_routed_experts_is_refused(
    tmp_path: Path, targets: Any
) -> None:
    """PEFT would wrap their tensors, and what is published would lack them."""
    policy = save_moe_policy(tmp_path / "policy")
    with pytest.raises(SettingsError, match=r"reaches routed experts.*other layers: .*'q_proj'"):
        check_targets(policy, LoraSettings(target_modules=targets))
    check_targets(policy, LoraSettings(target_modules=("q_proj", "v_proj")))
