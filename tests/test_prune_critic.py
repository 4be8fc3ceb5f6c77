"""Which checkpoint judges: a directory, or an adapter that is merged into its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.errors import ModelError
from posttrain.prune.settings import PruneSettings
from posttrain.stages.prune import critic_model, demands, locate_critic
from posttrain.workers.adapters import merge_adapter


@pytest.fixture(scope="module")
def adapter(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_policy)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(directory)
    return directory


def query_weight(directory: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]


def test_an_adapter_is_found_with_its_base_and_merged(
    adapter: Path, tiny_policy: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    files = locate_critic(str(adapter))
    assert (files.base, files.adapter) == (tiny_policy, adapter)
    assert files.adapter is not None
    merge_adapter(files.base, files.adapter, tmp_path / "merged", files.tokenizer)
    lora = load_file(adapter / "adapter_model.safetensors")
    (down,) = (w for name, w in lora.items() if "lora_A" in name)
    (up,) = (w for name, w in lora.items() if "lora_B" in name)
    # alpha / r = 2
    expected = query_weight(tiny_policy) + 2 * up @ down
    torch.testing.assert_close(query_weight(tmp_path / "merged"), expected)
    whole = locate_critic(str(tmp_path / "merged"))  # tokenizer and all
    assert whole.adapter is None
    assert critic_model(str(tmp_path / "merged"), 64).chat.template_hash == (
        critic_model(str(adapter), 64).chat.template_hash
    )


def test_the_fingerprint_is_of_both(adapter: Path, tiny_policy: Path, tmp_path: Path) -> None:
    base, both = critic_model(str(tiny_policy), 64), critic_model(str(adapter), 64)
    assert both.fingerprint != base.fingerprint
    assert critic_model(str(adapter), 64).fingerprint == both.fingerprint
    other = tmp_path / "other"
    other.mkdir()
    for file in adapter.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 8}))
    assert critic_model(str(other), 64).fingerprint != both.fingerprint


def test_a_critic_that_takes_fewer_tokens_than_are_asked_for_is_refused(tiny_policy: Path) -> None:
    critic_model(str(tiny_policy), 32768)
    with pytest.raises(
        ModelError, match=r"^--max-length is 32769, but .* takes 32768 tokens: lower"
    ):
        critic_model(str(tiny_policy), 32769)


def test_an_adapter_that_names_no_base_or_does_not_fit(
    adapter: Path, tiny_policy: Path, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"adapter_config\.json names no base model"):
        locate_critic(str(tmp_path))
    with pytest.raises(ModelError, match="is no readable checkpoint"):
        (tmp_path / "empty").mkdir()
        locate_critic(str(tmp_path / "empty"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    odd = {**config, "target_modules": ["no_such_projection"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(odd))
    weights = adapter / "adapter_model.safetensors"
    (tmp_path / "adapter_model.safetensors").write_bytes(weights.read_bytes())
    with pytest.raises(ModelError, match="does not fit"):
        merge_adapter(tiny_policy, tmp_path, tmp_path / "merged", tiny_policy)


def test_a_judge_that_is_a_model_counts_among_those_that_are_up() -> None:
    content: dict[str, Any] = {
        "source": {"path": "s.jsonl"},
        "critic": {"model": "m"},
        "resources": {
            "rollout": {"replicas": 2},
            "rewards": {"judge": {"replicas": 3, "actor": {"gpus": 1}}},
        },
    }

    def roles(**rewards: Any) -> list[tuple[str, int, float]]:
        found = demands(PruneSettings.model_validate({**content, "rewards": rewards}))
        return [(d.role, d.count, d.each.gpus) for d in found]

    alone = [("critic", 2, 0), ("rewards", 1, 0)]
    assert roles() == alone
    assert roles(judge={"endpoint": {"url": "http://here/v1", "model": "m"}}) == alone
    assert roles(judge={"model": "m"}) == [*alone, ("rewards.judge", 3, 1)]
