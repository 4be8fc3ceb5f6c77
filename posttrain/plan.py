"""What a run will take: memory by role and device, and a better split from what was measured."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from posttrain.config import Settings
from posttrain.data.sources import STARTER
from posttrain.inputs import STARTER_POLICY, STARTER_TEACHER, STARTER_TEACHER_DIR
from posttrain.memory import GIB, RoleMemory, other_memory, role_memory
from posttrain.metrics import read_metrics
from posttrain.model_shape import ModelShape, read_shape
from posttrain.roles import demands
from posttrain.run_dir import RunDir
from posttrain.split import best_split, measure
from posttrain.workers.adapters import base_of, is_adapter


def policy_shape(model: str) -> ModelShape:
    """Of what `policy.model` may be: `starter`, a checkpoint, a run (the policy that it left), an
    adapter (its base), or a name on the hub. ModelError if it is none of them."""
    return _shape(model, "policy.model")


def other_shapes(settings: Settings) -> dict[str, ModelShape]:
    """Of the models that this run serves beside its policy, by role. ModelError as above."""
    teacher = settings.teacher.model if settings.taught_stages else None
    named = {
        "teacher": str(STARTER_TEACHER_DIR) if teacher == STARTER_TEACHER else teacher,
        "rewards.judge": settings.rewards.models.get("judge"),
    }
    return {role: _shape(name, f"{role}.model") for role, name in named.items() if name is not None}


def _shape(model: str, setting: str) -> ModelShape:
    path = STARTER_POLICY if model == STARTER else Path(model)
    if RunDir(path).is_run():
        path = RunDir(path).policy_dir
    if is_adapter(path):
        return read_shape(base_of(path), setting)
    return read_shape(str(path) if path.is_dir() else model, setting)


def examine(settings: Settings, shape: ModelShape) -> dict[str, Any]:
    """Roles with their memory in GiB, and what to do where one does not fit."""
    gpu_gib = settings.resources.gpu_gib or _gpu_gib_here()
    others = other_memory(settings, other_shapes(settings), gpu_gib)
    roles = [*role_memory(settings, shape, gpu_gib), *others]
    asked = demands(settings)
    return {
        "model": settings.policy.model,
        "parameters": shape.parameters,
        "gpu_gib": gpu_gib,
        "gpus": sum(d.count * d.each.gpus for d in asked),
        "cpus": sum(d.count * d.each.cpus for d in asked),
        "demands": [demand.describe() for demand in asked],
        "roles": [_as_dict(role) for role in roles],
        "problems": _problems(settings, shape, roles),
    }


def propose(settings: Settings, shape: ModelShape, run: Path) -> dict[str, Any]:
    """Another split of the devices that `settings` give to engines and learner.

    Raises:
        RunDirError: `run` is no run.
        DataError: it holds too few steps of RL.
    """
    ran = RunDir(run)
    measured_with = ran.config()["settings"]["resources"]
    measured = measure(read_metrics(ran.metrics_path))
    rollout, learner = measured_with["rollout"], measured_with["learner"]
    # Without GPUs a device is a core that a process computes on.
    on_gpus = rollout["actor"]["gpus"] >= 1
    unit = rollout["engine"]["tensor_parallel"] if on_gpus else rollout["engine"]["threads"]
    width = 1 if on_gpus else settings.rl.learner.threads
    engines, learners = rollout["replicas"] * unit, learner["ranks"] * width
    split = best_split(
        measured,
        engines=engines,
        learners=learners,
        engine_unit=unit,
        learner_unit=width,
        max_lag=settings.rl.max_lag,
        fits=lambda devices: _learner_fits(settings, shape, devices // width),
    )
    return {
        "learner_idle_share": measured.learner_idle,
        "rollout_idle_share": measured.engines_idle,
        "step_s": measured.step,
        "now": {"replicas": engines // unit, "ranks": learners // width},
        "proposed": {"replicas": split.engines // unit, "ranks": split.learners // width},
        "expected_step_s": split.step,
        "lock_step": settings.rl.max_lag == 0,
    }


def _as_dict(role: RoleMemory) -> dict[str, Any]:
    return {
        "role": role.demand.role,
        "actors": role.demand.count,
        "devices_each": role.devices,
        "parts": dict(role.parts),
        "needed": role.needed,
        "available": role.available,
        "fits": role.fits,
        "note": role.note,
    }


def _problems(settings: Settings, shape: ModelShape, roles: list[RoleMemory]) -> list[str]:
    found = [
        f"{role.demand.role} needs {role.needed:.1f} GiB of {role.available:.1f} on each device, "
        f"most of it {_largest_part(role)}: {_remedy(role)}"
        for role in roles
        if role.fits is False
    ]
    on_cpu = [role for role in roles if not role.demand.each.gpus]
    needed = _at_once(settings, on_cpu)
    here = _memory_here()
    if on_cpu and needed > here:
        found.append(
            f"the roles without GPUs need {needed:.1f} GiB and this machine has {here:.1f}: take a "
            f"smaller model than this of {shape.parameters * 4 / GIB:.1f} GiB in fp32, or GPUs"
        )
    return found


_REMEDIES = {
    "weights": "more resources.learner.ranks with rl.learner.zero_stage=3, or a larger "
    "resources.rollout.engine.tensor_parallel with as many gpus",
    "gradients": "more resources.learner.ranks, or policy.lora={r: 16}",
    "optimizer": "more resources.learner.ranks, or policy.lora={r: 16}",
    "activations": "gradient checkpointing, or fewer rl.micro_tokens or rows a device",
    "logits": "fewer rl.learner.logprob_chunk_tokens, or rows a device",
    "kv_cache": "a smaller policy.max_length, or a larger gpu_memory_utilization",
    "framework": "a larger share of the GPU",
}
_REMEDIES_ELSEWHERE = {
    "teacher": "a larger resources.teacher.tensor_parallel, resources.teacher.dtype=bfloat16, or "
    "fewer resources.teacher.chunk_tokens",
    "rewards.judge": "a larger resources.rewards.judge.engine.tensor_parallel with as many gpus",
}


def _largest_part(role: RoleMemory) -> str:
    return max(role.parts, key=lambda part: role.parts[part])


def _remedy(role: RoleMemory) -> str:
    return _REMEDIES_ELSEWHERE.get(role.demand.role, _REMEDIES[_largest_part(role)])


def _at_once(settings: Settings, roles: list[RoleMemory]) -> float:
    """GiB of those that are up together, at most: stages follow one another, each with the teacher
    or the critic that it asks; engines stay."""
    gib = {role.demand.role: role.needed * role.demand.count for role in roles}
    teacher, critic = gib.pop("teacher", 0.0), gib.pop("judge", 0.0)
    stages = [
        gib.pop(stage, 0.0)
        + (teacher if stage in settings.taught_stages else 0.0)
        + (critic if stage == "rl" else 0.0)
        for stage in settings.stages
    ]
    return sum(gib.values()) + max(stages)


def _learner_fits(settings: Settings, shape: ModelShape, ranks: int) -> bool:
    resources = settings.resources
    learner = resources.learner.model_copy(update={"ranks": ranks})
    changed = settings.model_copy(
        update={"resources": resources.model_copy(update={"learner": learner})}
    )
    roles = role_memory(changed, shape, resources.gpu_gib or _gpu_gib_here())
    return all(role.fits is not False for role in roles)


def _gpu_gib_here() -> float | None:
    if shutil.which("nvidia-smi") is None:
        return None
    told = subprocess.run(
        ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
    )
    # A GPU that shares the host's memory has no number: [N/A].
    sizes = [int(word) for word in told.stdout.split() if word.isdecimal()]
    return min(sizes) / 1024 if sizes and told.returncode == 0 else None


def _memory_here() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
