"""Settings of engines, learner and publishing. They import neither torch nor Ray, so that a run's
settings are checked in an instant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from posttrain.losses.settings import LossSettings

Schedule = Literal["constant", "linear", "cosine"]


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` over it, table by table: what a nested table leaves out stays."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = merged(old, value) if both else value  # type: ignore[arg-type]
    return result


class ActorResources(BaseModel):
    """Logical resources of one actor, in Ray's units; fractions are shares of a device."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpus: float = Field(default=1.0, ge=0)
    gpus: float = Field(default=0.0, ge=0)


class LearnerResources(ActorResources):
    """Those of each of the learner's `ranks`, over which its optimizer state, gradients and, from
    ZeRO-3 on, weights are divided."""

    ranks: int = Field(default=1, gt=0)

    @model_validator(mode="after")
    def _ranks_share_no_gpu(self) -> Self:
        if self.ranks > 1 and self.gpus % 1:
            raise ValueError(
                f"{self.ranks} ranks with {self.gpus:g} GPUs each would share one, and NCCL does "
                "not let them; give each rank a whole GPU, or take one rank"
            )
        return self


class EngineSettings(BaseModel):
    """How an engine is started. `extra` reaches vLLM's own `AsyncEngineArgs` unchanged.

    An engine that has not confirmed new weights after `update_deadline_s`, or has requests but has
    neither answered nor written a token for `hang_deadline_s`, is replaced. `max_restarts` bounds
    how often one engine is started again without answering a request in between, and how often one
    request is given to another engine. A request that takes longer than `deadline_s` fails the run:
    in RL it must be above `rl.draw_deadline_s`, after which a draw is given up.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_model_len: int = Field(default=512, gt=0)
    max_num_seqs: int = Field(default=256, gt=0)
    tensor_parallel: int = Field(default=1, gt=0, description="devices that share one engine")
    threads: int = Field(default=1, gt=0, description="CPU threads, without a GPU")
    kv_cache_gib: int = Field(default=1, gt=0, description="KV cache, without a GPU")
    deadline_s: float = Field(default=900.0, gt=0, description="for one request")
    update_deadline_s: float = Field(default=300.0, gt=0)
    hang_deadline_s: float = Field(default=120.0, gt=0)
    max_restarts: int = Field(default=3, ge=0)
    extra: dict[str, Any] = {}


class RolloutPoolSettings(BaseModel):
    """vLLM engines, each in an actor with these resources."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    replicas: int = Field(default=1, gt=0)
    actor: ActorResources = ActorResources()
    engine: EngineSettings = EngineSettings()

    @model_validator(mode="after")
    def _engine_has_its_gpus(self) -> Self:
        """vLLM would only fail while it starts, and not say that it lacks a device."""
        gpus, devices = self.actor.gpus, self.engine.tensor_parallel
        if any(name.endswith("_parallel_size") for name in self.engine.extra):
            return self  # whoever asks vLLM itself for more devices counts them
        if gpus and gpus != devices and not (devices == 1 and gpus < 1):
            raise ValueError(
                f"engine.tensor_parallel = {devices} takes that many whole GPUs (1 may be a share "
                f"of one) and actor.gpus is {gpus:g}; set both to the same number"
            )
        return self

    def without_own_length(self) -> Self:
        """Itself. ValueError if it sets what `as_long_as` will."""
        given = self.engine.max_model_len
        if given != EngineSettings().max_model_len:
            raise ValueError(
                f"engine.max_model_len = {given} would change nothing: these engines take what the "
                "model is given, policy.max_length in a run and critic.max_length in pruning"
            )
        return self

    def as_long_as(self, max_length: int) -> RolloutPoolSettings:
        """The same, its engines taking sequences of `max_length` tokens, as the policy does."""
        engine = self.engine.model_copy(update={"max_model_len": max_length})
        return self.model_copy(update={"engine": engine})


class TeacherPoolSettings(ActorResources):
    """Copies of a teacher (and, after it, of the critic), each over `tensor_parallel` actors with
    these resources.

    A forward pass takes up to `batch_tokens` tokens, padding included, and makes the distributions
    of up to `chunk_tokens` tokens at a time; of one sequence it makes all. An answer that takes
    longer than `deadline_s` counts as lost, as one of an actor that died: the copy is started
    again, up to `max_restarts` times.
    """

    replicas: int = Field(default=1, gt=0)
    tensor_parallel: int = Field(default=1, gt=0, description="devices that share one copy")
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int = Field(default=1, gt=0, description="CPU threads of an actor, without a GPU")
    batch_tokens: int = Field(default=8192, gt=0)
    chunk_tokens: int = Field(default=4096, gt=0)
    deadline_s: float = Field(default=1800.0, gt=0)
    max_restarts: int = Field(default=3, ge=0)


class LoraSettings(BaseModel):
    """A low-rank adapter by PEFT. `target_modules` names linear layers (the ends of their names);
    `all-linear` takes all of them but the head. Routed experts take no adapter: where PEFT would
    count them among these, other layers have to be named. Merged into bf16 weights an adapter is
    rounded with them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    r: int = Field(default=16, gt=0)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"


OWNED = {
    "zero_optimization.stage": "set rl.learner.zero_stage",
    "optimizer": "set rl.learner.learning_rate, betas and weight_decay",
    "expert_parallel": "set rl.learner.expert_parallel",
    "scheduler": "set rl.learner.schedule and warmup_steps",
    "bf16": "set rl.learner.dtype",
    "fp16": "set rl.learner.dtype",
    "gradient_clipping": "set rl.learner.max_grad_norm",
    "gradient_accumulation_steps": "micro-batches are cut by rl.micro_tokens",
    "train_batch_size": "set rl.groups_per_step and rl.group_size",
    "train_micro_batch_size_per_gpu": "micro-batches are cut by rl.micro_tokens",
}
"""Of DeepSpeed's settings, those that would reach a part of what has to know them, or nothing."""


class LearnerSettings(BaseModel):
    """How the policy is trained online. `deepspeed` is merged over the configuration made here, but
    for what has a setting of its own.

    `schedule` runs over rl.num_steps after the warm-up. Together `expert_parallel` ranks hold a
    mixture's experts once; 1 leaves them to ZeRO. `step_deadline_s` bounds whatever all ranks do
    together: a step, a publish, a checkpoint.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    loss: LossSettings = LossSettings()
    learning_rate: float = Field(default=1e-5, gt=0)
    schedule: Schedule = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = Field(default=1.0, gt=0)
    dtype: Literal["float32", "bfloat16"] = "float32"
    zero_stage: Literal[1, 2, 3] = 2
    expert_parallel: int = Field(default=1, gt=0)
    gradient_checkpointing: bool = False
    threads: int = Field(default=1, gt=0, description="CPU threads of a rank, without a GPU")
    logprob_chunk_tokens: int = Field(default=4096, gt=0)
    max_skipped_steps: int = Field(default=3, gt=0)
    step_deadline_s: float = Field(default=1800.0, gt=0)
    deepspeed: dict[str, Any] = {}

    @field_validator("deepspeed")
    @classmethod
    def _not_what_has_a_setting(cls, deepspeed: dict[str, Any]) -> dict[str, Any]:
        zero = deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError(f"zero_optimization is a table, got {zero!r}")
        given = {*deepspeed, *(f"zero_optimization.{key}" for key in zero)}
        for key, instead in OWNED.items():
            if key in given:
                raise ValueError(f"{key} cannot be set here: {instead}")
        return deepspeed


class PublishSettings(BaseModel):
    """When engine and learner are compared on recent answers, and how far apart they may be.

    The probe runs after each of the `probe_first` first publishes and after every `probe_every`th.
    Where both compute in fp32, log-probabilities may differ by `max_mismatch` nats (they do by
    about 1e-6). Where either computes in 16 bits they differ by design: then the mean
    difference may not exceed `max_growth` times what the first probe measured, nor k3 what 16 bits
    may cost (`posttrain.workers.probe.MAX_K3`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    probe_first: int = Field(default=3, ge=1)
    probe_every: int = Field(default=20, ge=1)
    max_mismatch: float = Field(default=1e-4, gt=0)
    max_growth: float = Field(default=3.0, gt=1)
