"""Estimated memory: against hand-computed numbers of bytes, and a checkpoint's own headers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import Settings, load
from posttrain.errors import ModelError
from posttrain.inputs import STARTER_POLICY
from posttrain.memory import GIB, kv_gib, learner_parts, other_memory, role_memory
from posttrain.model_shape import ModelShape, read_shape
from posttrain.workers.settings import EngineSettings, LearnerSettings, LoraSettings

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"

ROUND = ModelShape(
    parameters=GIB,  # so that a byte a parameter is a GiB
    expert_parameters=GIB // 2,
    adapter_width=GIB // 1024,
    layers=32,
    hidden_size=4096,
    kv_heads=8,
    head_dim=128,
    vocab_size=2**17,
)


def parts(ranks: int = 1, tokens: int = 2**13, lora: Any = None, **settings: Any) -> dict[str, Any]:
    return learner_parts(ROUND, LearnerSettings(**settings), lora, ranks=ranks, tokens=tokens)


def settings(*overrides: str) -> Settings:
    return load(QUICKSTART, overrides)


def test_the_starter_is_as_large_as_its_weights() -> None:
    from safetensors import safe_open

    with safe_open(STARTER_POLICY / "model.safetensors", framework="np") as weights:
        count = sum(weights.get_tensor(name).size for name in weights.keys())  # noqa: SIM118
    shape = read_shape(str(STARTER_POLICY))
    assert shape.parameters == count
    assert 1e6 < count < 2e6
    assert shape.expert_parameters == 0
    assert shape.layers == 4


def test_experts_are_told_from_the_rest(tmp_path: Path) -> None:
    from engine_models import save_moe_policy

    policy = save_moe_policy(tmp_path / "moe")
    shape = read_shape(str(policy))
    assert 0 < shape.expert_parameters < shape.parameters


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"the size of {tmp_path} cannot be read"):
        read_shape(str(tmp_path))


@pytest.mark.parametrize(
    ("ranks", "zero", "dtype", "expected"),
    [
        # weights, gradients in fp32, AdamW's two moments and its master copy
        (1, 2, "float32", (4, 4, 12)),
        (1, 2, "bfloat16", (2, 4, 12)),
        (4, 1, "bfloat16", (2, 4, 3)),
        (4, 2, "bfloat16", (2, 1, 3)),
        (4, 3, "bfloat16", (0.5, 1, 3)),
    ],
)
def test_states_are_divided_as_zero_says(
    ranks: int, zero: int, dtype: str, expected: tuple[float, ...]
) -> None:
    found = parts(ranks, zero_stage=zero, dtype=dtype)
    assert (found["weights"], found["gradients"], found["optimizer"]) == expected


def test_a_reference_is_a_second_copy_unless_there_is_an_adapter() -> None:
    kl = {"kl_coefficient": 0.1}
    assert parts(dtype="bfloat16", loss=kl)["weights"] == 4
    found = parts(dtype="bfloat16", loss=kl, lora=LoraSettings(r=16))
    assert found["weights"] == 2
    assert found["gradients"] == 16 * 4 / 1024
    assert found["optimizer"] == 16 * 12 / 1024


def test_experts_are_held_once_by_so_many_ranks() -> None:
    found = parts(4, dtype="bfloat16", expert_parallel=4)
    assert found["weights"] == 2 * (0.5 + 0.5 / 4)


def test_activations_and_logits_follow_the_tokens() -> None:
    tokens = 2**13
    whole = parts(tokens=tokens, dtype="bfloat16")
    layer = 34 * tokens * 4096 / GIB
    assert whole["activations"] == 32 * layer
    spared = parts(tokens=tokens, dtype="bfloat16", gradient_checkpointing=True)
    assert spared["activations"] == layer + 32 * 2 * tokens * 4096 / GIB
    assert whole["logits"] == 3 * 4 * 4096 * 2**17 / GIB  # of one chunk
    assert parts(tokens=1024)["logits"] == 3 * 4 * 1024 * 2**17 / GIB


def test_kv_cache_of_a_sequence() -> None:
    # 2 (keys and values) · 32 layers · 8 heads · 128 · 2 bytes = 128 KiB a token
    whole = EngineSettings(dtype="bfloat16")
    assert kv_gib(ROUND, whole, 8192) == 1.0
    assert kv_gib(ROUND, whole.model_copy(update={"tensor_parallel": 4}), 8192) == 0.25
    assert kv_gib(ROUND, whole.model_copy(update={"tensor_parallel": 16}), 8192) == 0.125


def test_roles_on_gpus_are_measured_against_their_share() -> None:
    found = role_memory(
        settings(
            "stages=[screen, sft, rl, dpo]",
            "resources.rollout.actor.gpus=0.5",
            "resources.rollout.engine.dtype=bfloat16",
            "resources.rollout.engine.extra={gpu_memory_utilization: 0.45}",
            "resources.learner.gpus=0.5",
        ),
        ROUND,
        gpu_gib=80,
    )
    assert [role.demand.role for role in found] == ["rollout", "sft", "rl", "dpo"]
    engine, sft, rl, _ = found
    assert engine.available == 36  # 0.45 of the device, less than Ray's half
    assert engine.parts["weights"] == 2
    assert engine.fits
    assert rl.available == 40
    assert rl.parts["framework"] == 1.5
    # SFT of the quickstart: 32 rows of 192 tokens, all logits at once
    assert sft.parts["logits"] == 3 * 4 * 32 * 192 * 2**17 / GIB
    assert (sft.needed, sft.fits) == (81.5, False)
    tight = role_memory(
        settings("resources.rollout.actor.gpus=1", "resources.learner.gpus=0.25"), ROUND, 80
    )
    assert [role.fits for role in tight if role.demand.role == "rl"] == [False]
    assert all(role.fits is None for role in role_memory(settings(), ROUND, None))


def test_a_teacher_and_a_judge_have_models_of_their_own() -> None:
    asked = settings(
        "teacher.model=starter-teacher",
        "rl.distillation={}",
        "resources.teacher={gpus: 1, replicas: 2, tensor_parallel: 4, dtype: bfloat16}",
        "rewards.judge={model: starter}",
        "resources.rewards.judge={actor: {gpus: 0.5}, engine: {max_model_len: 8192}}",
    )
    teacher, judge = other_memory(asked, {"teacher": ROUND, "rewards.judge": ROUND}, gpu_gib=80)
    assert (teacher.demand.role, teacher.demand.count) == ("teacher", 8)
    assert teacher.parts == {"weights": 0.5, "logits": 6.0, "framework": 1.5}
    assert (teacher.available, teacher.fits) == (80, True)
    # fp32: 4 bytes a parameter, 256 KiB of KV cache a token
    assert judge.demand.role == "rewards.judge"
    assert judge.parts == {"weights": 4.0, "framework": 1.5, "kv_cache": 2.0}
    assert judge.available == 40
    large = replace(ROUND, parameters=70 * GIB)
    alone = settings(
        *("teacher.model=starter-teacher", "rl.distillation={}"),
        "resources.teacher={gpus: 1, dtype: bfloat16}",
    )
    (teacher,) = other_memory(alone, {"teacher": large}, gpu_gib=80)
    assert (teacher.parts["weights"], teacher.fits) == (140, False)
