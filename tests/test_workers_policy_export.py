"""What leaves as a checkpoint, whatever came in with the policy. One process, no learner."""

import json

import pytest
import torch
from engine_models import save_policy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from posttrain.workers import policy_export
from posttrain.workers.policy_export import save_model

CONTRADICTORY = {"temperature": 0.6, "top_p": 0.95, "eos_token_id": [2, 5], "early_stopping": True}


@pytest.fixture
def model(tmp_path):
    """Its generation settings are of a kind that published checkpoints have."""
    policy = save_policy(tmp_path / "policy", tied=False)
    (policy / "generation_config.json").write_text(json.dumps(CONTRADICTORY))
    return AutoModelForCausalLM.from_pretrained(policy)


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(policy_export.dist, "get_rank", lambda: 0)


def test_generation_settings_that_contradict_themselves_are_saved_as_they_came(model, tmp_path):
    with pytest.raises(ValueError, match="Fix these issues"):
        model.save_pretrained(tmp_path / "plain")
    save_model(model, tmp_path / "saved", {k: v + 1 for k, v in model.state_dict().items()})
    written = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert written.items() >= CONTRADICTORY.items()
    assert model.generation_config.temperature == 0.6
    saved, before = load_file(tmp_path / "saved" / "model.safetensors"), model.state_dict()
    assert all(torch.equal(saved[name], before[name] + 1) for name in before)


def test_sound_generation_settings_are_saved_as_transformers_does(model, tmp_path):
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=2)
    model.save_pretrained(tmp_path / "plain")
    save_model(model, tmp_path / "saved")
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "saved").iterdir())
    for name in names:
        plain, saved = (tmp_path / kind / name for kind in ("plain", "saved"))
        assert plain.read_bytes() == saved.read_bytes()


def test_the_policy_is_saved_with_its_tokenizer(alone, model, tmp_path):
    policy_export.save_policy(model, str(tmp_path / "saved"), str(tmp_path / "policy"))
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


def test_a_policy_is_whole_or_not_there(alone, model, tmp_path):
    """The tokenizer comes last: what is there without one is half of a policy."""
    target = tmp_path / "exports" / "export-7"
    with pytest.raises((OSError, ValueError), match="nowhere"):
        policy_export.save_policy(model, str(target), str(tmp_path / "nowhere"))
    assert list(target.parent.iterdir()) == []
