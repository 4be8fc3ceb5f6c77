"""What runs in the process of one rank: TRL's own trainer, and the policies that it leaves."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray.train

from posttrain.errors import StageError
from posttrain.stages.teaching import DistillationJob
from posttrain.stages.trl_log import write_record
from posttrain.stages.trl_settings import Kind, trainer_classes
from posttrain.workers import policy_export
from posttrain.workers.experts import fetch_experts_as_one
from posttrain.workers.extensions import prepare_extensions
from posttrain.workers.policy_model import adapter_config, find_backbone, recompute_buffers
from posttrain.workers.settings import LoraSettings, merged

LOG, OUTCOME = "log.jsonl", "outcome.json"
"""Under `trainer/`, written by rank 0."""

DEEPSPEED_DEFAULTS: Mapping[str, Any] = {
    "zero_optimization": {"stage": 2},
    # "auto" is filled in from TRL's settings, so that each number stands in one place.
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


@dataclass(frozen=True, kw_only=True)
class RankJob:
    """What a rank needs. `trainer` goes to TRL's `SFTConfig` or `DPOConfig` unchanged, `deepspeed`
    over `DEEPSPEED_DEFAULTS`. `checkpoints` policies are saved under `directory`, the last at the
    end."""

    kind: Kind
    model: str
    trainer: Mapping[str, Any]
    deepspeed: Mapping[str, Any]
    lora: LoraSettings | None
    directory: str
    checkpoints: int
    seed: int
    threads: int
    dtype: str
    distillation: DistillationJob | None = None


def train_rank(config: Mapping[str, Any]) -> None:
    """Trains, saves the policies and, on rank 0, what came of it."""
    import torch
    from datasets import load_from_disk
    from transformers import AutoTokenizer, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    job: RankJob = config["job"]
    # accelerate chooses DeepSpeed only for a process that looks launched by it.
    os.environ.setdefault("LOCAL_RANK", str(ray.train.get_context().get_local_rank()))
    if not torch.cuda.is_available():
        train_on_cpu()
        torch.set_num_threads(job.threads)
        prepare_extensions()
    set_seed(job.seed)
    trainer_class: Callable[..., Any]
    config_class, trainer_class = trainer_classes(job.kind)
    if job.distillation is not None:
        from posttrain.stages.sft_distill import DistillingTrainer

        trainer_class = partial(DistillingTrainer, distillation=job.distillation)
    output = Path(job.directory) / "trainer"
    arguments = config_class(**_arguments(job, output))
    # After the arguments: they say whether it is divided over the ranks while it is loaded.
    model = _load_model(job)
    config_before = copy.deepcopy(model.config)
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=load_from_disk(str(Path(job.directory) / "data")),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=None if job.lora is None else adapter_config(job.lora),
    )
    if not trainer.is_deepspeed_enabled:
        raise StageError("TRL would train without DeepSpeed; look at trainer and deepspeed")

    def save(step: int) -> None:
        target = Path(job.directory) / "checkpoints" / f"step-{step}"
        policy = str(target / "policy")
        # With ZeRO-3 accelerate trains fp32 weights, whatever they were loaded as.
        policy_export.save_policy(model, policy, job.model, getattr(torch, job.dtype))
        if job.lora is not None:
            policy_export.save_adapter(trainer.model, str(target / "adapter"))
        if trainer.is_world_process_zero():
            # TRL writes what it wants of a model into its configuration.
            config_before.save_pretrained(policy)

    trainer.add_callback(_callback(job.checkpoints, save, output / LOG))
    # Of an interrupted attempt, if `trainer.save_strategy` made it leave one.
    left = get_last_checkpoint(str(output)) if output.is_dir() else None
    outcome = trainer.train(resume_from_checkpoint=left)
    _refuse_anything_but_deepspeed(trainer)
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        found = {"metrics": outcome.metrics, "history": trainer.state.log_history}
        if job.distillation is not None:
            found["metrics"]["teacher"] = trainer.teaching_report
        (output / OUTCOME).write_text(json.dumps(found))


def train_on_cpu() -> None:
    """Puts right what transformers and accelerate take for granted: that there is a GPU.

    Without one accelerate finds no backend, takes the number of ranks for one, and each would train
    alone (Ray Train has connected them by gloo); transformers would refuse bf16.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from transformers import training_args

    def backend(*_: Any, **__: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.NO  # DeepSpeed takes its place later

    PartialState._prepare_backend = backend
    training_args.is_torch_bf16_gpu_available = lambda: True


def save_steps(count: int, max_steps: int) -> frozenset[int]:
    """`count` steps at even distances, the last among them; fewer if there are no more steps."""
    return frozenset(math.ceil(max_steps * i / count) for i in range(1, count + 1))


def _arguments(job: RankJob, output: Path) -> dict[str, Any]:
    return {
        "output_dir": str(output),
        "seed": job.seed,
        "bf16": job.dtype == "bfloat16",
        # The stage keeps the policies and the log; TRL need not keep them once more.
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "deepspeed": merged(DEEPSPEED_DEFAULTS, job.deepspeed),
        **job.trainer,
    }


def _load_model(job: RankJob) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype))
    find_backbone(model)
    if is_deepspeed_zero3_enabled():
        fetch_experts_as_one(model)
        if job.dtype == "bfloat16":
            recompute_buffers(model)
    return model


def _callback(count: int, save: Callable[[int], None], log: Path) -> Any:
    from transformers import TrainerCallback

    class SaveAndTell(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step in save_steps(count, state.max_steps):
                save(state.global_step)

        def on_log(self, _: Any, state: Any, __: Any, logs: Mapping[str, Any], **___: Any) -> None:
            if state.is_world_process_zero:
                steps = {"step": state.global_step, "max_steps": state.max_steps}
                write_record(log, steps | dict(logs))

    return SaveAndTell()


def _refuse_anything_but_deepspeed(trainer: Any) -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    if not isinstance(trainer.model_wrapped, DeepSpeedEngine):
        wrapped = type(trainer.model_wrapped).__name__
        raise StageError(f"TRL trained a {wrapped} instead of a DeepSpeedEngine")
