"""Every stage on other policies than the starter: mixtures of experts, adapters."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    set_seed,
)

from posttrain.audit import audit
from posttrain.run_dir import RunDir
from posttrain.starter import POLICY_DIR
from posttrain.starter.tokenizer import END, PAD, VOCABULARY, build_tokenizer
from posttrain.workers.weights import read_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).parents[1]
LENGTH = 128
COMMON = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": VOCABULARY.index(END),
    "pad_token_id": VOCABULARY.index(PAD),
    "initializer_range": 0.05,
    "dtype": "float32",
}


def qwen3_moe():
    experts = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, **experts))


def llama4():
    """Of two layers one with experts; attention in chunks of a whole KV block."""
    return Llama4ForCausalLM(
        Llama4TextConfig(
            **COMMON,
            intermediate_size=64,
            intermediate_size_mlp=64,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
            attention_chunk_size=128,
        )
    )


POLICIES = {"qwen3-moe": qwen3_moe, "llama4": llama4}


def write(file, rows):
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return {"source": str(file)}


def settings(directory, policy, **changes):
    """Sums of one digit: who has learned the form alone is right now and then."""
    sums = [(a, b) for a in range(10) for b in range(10) if a + b < 10]
    random.Random(0).shuffle(sums)
    rows = [{"question": f"{a}+{b}=?", "answer": str(a + b)} for a, b in sums]
    taught = [row | {"completion": f"#{row['answer']}"} for row in rows[8:]]
    light = {
        "per_device_train_batch_size": 16,
        "learning_rate": 5e-3,
        "gradient_checkpointing": False,
    }
    return {
        "run": {"dir": str(directory / "run")},
        "policy": {"model": str(policy), "max_length": LENGTH},
        "tasks": {
            "train": [write(directory / "train.jsonl", rows[8:])],
            "held_out": [write(directory / "held_out.jsonl", rows[:8])],
        },
        "screen": {"judge": {"adaptive": False, "max_samples": 2, "max_tokens": 8}},
        "sft": {
            "data": write(directory / "sft.jsonl", taught),
            "budget": {"steps": 40},
            "checkpoints": {"count": 2, "max_fall": 1},
            "trainer": light,
        },
        "rl": {
            "num_steps": 2,
            "groups_per_step": 4,
            "group_size": 8,
            "max_tokens": 8,
            "row_tokens": 64,
            "learner": {"learning_rate": 1e-4},
        },
        "dpo": {
            "mining": {"num_prompts": 40, "max_tokens": 8},
            "guard": {"max_fall": 1},
            "trainer": light | {"learning_rate": 1e-4},
        },
        "resources": {
            "rollout": {"actor": {"cpus": 1}},
            "learner": {"cpus": 0.5},
            "rewards": {"actor": {"cpus": 0}},
        },
        "eval": {"max_tokens": 8},
    } | changes


def starter_tasks():
    return {
        "tasks": {
            "train": [{"source": "starter", "size": 64}],
            "held_out": [{"source": "starter", "size": 16}],
        },
        "system_instructions": [
            {"name": "brief", "text": "Answer only."},
            {"name": "steps", "text": "Show steps."},
            {"name": "brackets", "text": "Use brackets."},
        ],
        "eval": {"max_tokens": 96},
    }


def run(directory, config):
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "posttrain.cli", "run", str(directory / "config.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return RunDir(directory / "run")


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("name", POLICIES)
def test_experts_go_through_every_stage(tmp_path, name):
    policy = tmp_path / "policy"
    set_seed(0)
    POLICIES[name]().save_pretrained(policy)
    build_tokenizer(max_length=LENGTH).save_pretrained(policy)
    config = settings(tmp_path, policy)
    if name == "llama4":  # TRL looks for the number of its experts under another name
        for stage in ("sft", "dpo"):
            config[stage]["trainer"] = config[stage]["trainer"] | {"router_aux_loss_coef": 0.0}
    done = run(tmp_path, config)
    assert {stage: r.state for stage, r in done.stages().items()} == dict.fromkeys(
        ("start", "screen", "sft", "rl", "dpo"), "done"
    )
    assert audit(done.ledger_path).ok
    weights = [
        read_checkpoint(p)
        for p in (policy, *(done.stage_dir(s) / "policy" for s in ("sft", "rl", "dpo")))
    ]
    for before, after in itertools.pairwise(weights):
        assert before.keys() == after.keys()
        moved = changed(before, after)
        assert any("experts" in tensor for tensor in moved)
        assert any("router" in tensor or "mlp.gate." in tensor for tensor in moved)
    assert done.stages()["rl"].metrics["steps"] == 2
    config = json.loads((done.policy_dir / "config.json").read_text())
    assert config == json.loads((policy / "config.json").read_text())


def test_adapters_go_through_every_stage(tmp_path):
    starter = POLICY_DIR
    config = settings(tmp_path, starter) | starter_tasks()
    config["policy"] = {"model": "starter", "max_length": 192, "lora": {"r": 4, "alpha": 8}}
    config["sft"]["data"] = {"source": "starter", "size": 64}
    config["rl"] |= {"max_tokens": 96, "row_tokens": 128}
    config["dpo"]["mining"]["max_tokens"] = 96
    config["screen"]["judge"]["max_tokens"] = 96
    done = run(tmp_path, config)
    stages = ("sft", "rl", "dpo")
    for stage in stages:
        assert (done.stage_dir(stage) / "adapter" / "adapter_model.safetensors").exists()
    whole = load_file(done.stage_dir("dpo") / "policy" / "model.safetensors")
    assert not (done.policy_dir / "config.json").exists()
    base = AutoModelForCausalLM.from_pretrained(starter, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, str(done.policy_dir)).merge_and_unload().state_dict()
    for name, tensor in whole.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-5, rtol=0)
    start = load_file(starter / "model.safetensors")
    assert all("_proj" in name for name in changed(start, whole))
    rank = json.loads((done.policy_dir / "adapter_config.json").read_text())["r"]
    assert rank == len(stages) * 4

    config["policy"]["merge_adapter"] = True
    again = run(tmp_path, config)
    assert load_file(again.policy_dir / "model.safetensors").keys() == whole.keys()
    assert not (again.policy_dir / "adapter_config.json").exists()
