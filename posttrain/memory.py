"""How much memory each role needs on each of its devices: estimates, by parts, in GiB.

Weights and optimizer states are exact up to padding (ZeRO: Rajbhandari et al. 2020, §3 and §5).
Activations follow Korthikanti et al. 2022 with attention that is not materialised: 34 bytes a
token, hidden unit and layer in 16 bits. What frameworks keep for themselves is a flat allowance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from posttrain.config import Settings
from posttrain.model_shape import ModelShape
from posttrain.roles import has_own_critic
from posttrain.workers.demand import Demand
from posttrain.workers.settings import (
    EngineSettings,
    LearnerSettings,
    LoraSettings,
    RolloutPoolSettings,
)

GIB = 2**30
ACTIVATION_BYTES = 17
"""A token, hidden unit, layer and byte of the data type."""
FRAMEWORK_GIB = 1.5
"""Context, kernels' workspaces and fragmentation of one GPU process."""
GPU_MEMORY_UTILIZATION = 0.9
"""vLLM's own default."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class RoleMemory:
    """`parts` of one device of a role (one process, without GPUs). `available` is its share of the
    device, None if the device's size is not known. `note` says what the figures mean."""

    demand: Demand
    devices: int
    parts: Mapping[str, float]
    available: float | None
    note: str

    @property
    def needed(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool | None:
        return None if self.available is None else self.needed <= self.available


def role_memory(settings: Settings, shape: ModelShape, gpu_gib: float | None) -> list[RoleMemory]:
    """Every role that holds the policy's weights, in the order in which the stages use them."""
    resources = settings.resources
    max_length = settings.policy.max_length
    roles = [_engines("rollout", resources.rollout, shape, max_length, gpu_gib)]
    if has_own_critic(settings):
        roles.append(_engines("judge", resources.judge, shape, max_length, gpu_gib))
    learner = resources.learner
    for stage in settings.stages:
        if stage == "screen":
            continue
        parts = (
            learner_parts(
                shape,
                settings.rl.learner,
                settings.policy.lora,
                ranks=learner.ranks,
                # A sequence is never cut.
                tokens=max(settings.rl.micro_tokens, max_length),
            )
            if stage == "rl"
            else _trainer_parts(stage, settings, shape)
        )
        if learner.gpus:
            parts |= {"framework": FRAMEWORK_GIB}
        roles.append(
            RoleMemory(
                demand=Demand(role=stage, count=learner.ranks, each=learner),
                devices=1,
                parts=parts,
                available=_share(gpu_gib, learner.gpus),
                note=f"a rank of {learner.ranks}",
            )
        )
    return roles


def other_memory(
    settings: Settings, shapes: Mapping[str, ModelShape], gpu_gib: float | None
) -> list[RoleMemory]:
    """Roles that serve a model of their own, `teacher` and `rewards.judge`: its shape by role."""
    resources, roles = settings.resources, list[RoleMemory]()
    if "teacher" in shapes:
        pool, shape, ranks = resources.teacher, shapes["teacher"], resources.teacher.tensor_parallel
        parts = {
            "weights": shape.parameters * BYTES[pool.dtype] / ranks / GIB,
            # Those of one sequence are made together.
            "logits": _logits(
                shape, max(min(pool.batch_tokens, pool.chunk_tokens), settings.policy.max_length)
            ),
        }
        if pool.gpus:
            parts |= {"framework": FRAMEWORK_GIB}
        roles.append(
            RoleMemory(
                demand=Demand(role="teacher", count=pool.replicas * ranks, each=pool),
                devices=1,
                parts=parts,
                available=_share(gpu_gib, pool.gpus),
                note=f"a copy over {ranks}",
            )
        )
    if "rewards.judge" in shapes:
        judge, role = resources.rewards.judge, "rewards.judge"
        roles.append(_engines(role, judge, shapes[role], judge.engine.max_model_len, gpu_gib))
    return roles


def learner_parts(
    shape: ModelShape,
    settings: LearnerSettings,
    lora: LoraSettings | None,
    *,
    ranks: int,
    tokens: int,
) -> dict[str, float]:
    """Of one rank of the online learner; `tokens` are those of a micro-batch."""
    width = BYTES[settings.dtype]
    held = shape.parameters - shape.expert_parameters * (1 - 1 / settings.expert_parallel)
    # An adapter that is switched off is the reference.
    copies = 1 if lora is not None or not settings.loss.kl_coefficient else 2
    states = _states(shape, width, settings.zero_stage, ranks, held=held, copies=copies, lora=lora)
    return {
        **states,
        "activations": _activations(shape, tokens, width, settings.gradient_checkpointing),
        "logits": _logits(shape, min(tokens, settings.logprob_chunk_tokens)),
    }


def _trainer_parts(stage: str, settings: Settings, shape: ModelShape) -> dict[str, float]:
    """Of one rank of SFT or DPO. TRL computes the logits of all tokens at once."""
    own = settings.sft if stage == "sft" else settings.dpo
    width = BYTES[settings.policy.dtype]
    zero = own.deepspeed.get("zero_optimization", {}).get("stage", 2)
    sequences = own.trainer.get("per_device_train_batch_size", 8) * (2 if stage == "dpo" else 1)
    tokens = sequences * own.trainer.get("max_length", settings.policy.max_length)
    states = _states(
        shape,
        width,
        zero,
        settings.resources.learner.ranks,
        held=shape.parameters,
        copies=2 if stage == "dpo" and settings.policy.lora is None else 1,
        lora=settings.policy.lora,
    )
    checkpointing = own.trainer.get("gradient_checkpointing", True)
    return {
        **states,
        "activations": _activations(shape, tokens, width, checkpointing),
        "logits": _logits(shape, tokens),
    }


def _states(
    shape: ModelShape,
    width: int,
    stage: int,
    ranks: int,
    *,
    held: float,
    copies: int,
    lora: LoraSettings | None,
) -> dict[str, float]:
    """Weights (`copies` of them: a frozen reference is one; a rank below ZeRO-3 has `held` of the
    parameters), gradients added up in fp32, and AdamW: two moments and a master copy in fp32."""
    trained = shape.parameters if lora is None else lora.r * shape.adapter_width
    weights = (shape.parameters / ranks if stage >= 3 else held) * width * copies
    return {
        "weights": weights / GIB,
        "gradients": trained * 4 / (ranks if stage >= 2 else 1) / GIB,
        "optimizer": trained * 12 / ranks / GIB,
    }


def _activations(shape: ModelShape, tokens: int, width: int, checkpointing: bool) -> float:
    """Gradient checkpointing keeps a layer's input, and all of one layer at a time."""
    layer = ACTIVATION_BYTES * width * tokens * shape.hidden_size / GIB
    if not checkpointing:
        return shape.layers * layer
    return layer + shape.layers * width * tokens * shape.hidden_size / GIB


def _logits(shape: ModelShape, tokens: int) -> float:
    """In fp32, beside their log-softmax and gradient."""
    return 3 * 4 * tokens * shape.vocab_size / GIB


def _engines(
    role: str, pool: RolloutPoolSettings, shape: ModelShape, max_length: int, gpu_gib: float | None
) -> RoleMemory:
    engine = pool.engine
    demand = Demand(role=role, count=pool.replicas, each=pool.actor)
    width = BYTES[engine.dtype]
    weights = shape.parameters * width / engine.tensor_parallel / GIB
    sequence = kv_gib(shape, engine, max_length)
    if not pool.actor.gpus:
        return RoleMemory(
            demand=demand,
            devices=1,
            parts={"weights": weights, "kv_cache": float(engine.kv_cache_gib)},
            available=None,
            note=_sequences(engine.kv_cache_gib / sequence, engine, max_length),
        )
    share = _share(gpu_gib, pool.actor.gpus / engine.tensor_parallel)
    parts = {"weights": weights, "framework": FRAMEWORK_GIB, "kv_cache": sequence}
    note = f"KV cache of one sequence of {max_length} tokens; vLLM takes what is left for more"
    available = None
    if gpu_gib is not None and share is not None:
        # vLLM reckons with the whole device, whatever share of it Ray has given.
        usable = gpu_gib * engine.extra.get("gpu_memory_utilization", GPU_MEMORY_UTILIZATION)
        available = min(share, usable)
        left = available - weights - FRAMEWORK_GIB
        note = _sequences(max(left, 0.0) / sequence, engine, max_length)
    return RoleMemory(
        demand=demand, devices=engine.tensor_parallel, parts=parts, available=available, note=note
    )


def kv_gib(shape: ModelShape, engine: EngineSettings, tokens: int) -> float:
    """KV cache of one sequence on each device; heads that cannot be divided are repeated."""
    heads = max(shape.kv_heads / engine.tensor_parallel, 1)
    return 2 * shape.layers * heads * shape.head_dim * BYTES[engine.dtype] * tokens / GIB


def _sequences(room: float, engine: EngineSettings, max_length: int) -> str:
    return (
        f"room for {room:.0f} sequences of {max_length} tokens at once "
        f"(max_num_seqs {engine.max_num_seqs})"
    )


def _share(gpu_gib: float | None, gpus: float) -> float | None:
    return None if gpu_gib is None or not gpus else gpu_gib * min(gpus, 1.0)
