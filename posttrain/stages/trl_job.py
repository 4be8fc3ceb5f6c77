"""One of TRL's trainers, unmodified, under DeepSpeed inside Ray Train.

SFT and DPO differ only in the trainer's class and the shape of the records.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from posttrain.errors import StageError
from posttrain.stages.trl_settings import Kind
from posttrain.workers.settings import ActorResources, merged

DEEPSPEED_DEFAULTS: Mapping[str, Any] = {
    "zero_optimization": {"stage": 2},
    # "auto" is filled in from TRL's settings, so that each number stands in one place.
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What a rank needs. `trainer` goes to TRL's `SFTConfig` or `DPOConfig` unchanged,
    `deepspeed` over `DEEPSPEED_DEFAULTS`."""

    kind: Kind
    model: str
    records: Sequence[Mapping[str, Any]]
    trainer: Mapping[str, Any]
    deepspeed: Mapping[str, Any]
    output: str
    seed: int
    threads: int
    dtype: str


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray Train's trainer without its answer to Ctrl-C, which ends the process with 0."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


def run_job(job: TrainingJob, *, resources: ActorResources, scratch: Path) -> dict[str, Any]:
    """Trains, writes the policy to `job.output`, returns TRL's own metrics and log history.

    Raises:
        StageError: a rank failed, or TRL did not train under DeepSpeed.
    """
    environment = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "OMP_NUM_THREADS": str(job.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    }
    if resources.gpus == 0:
        environment["DS_ACCELERATOR"] = "cpu"
    trainer = _Trainer(
        _train_rank,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=1,
            use_gpu=resources.gpus > 0,
            resources_per_worker={"CPU": resources.cpus, "GPU": resources.gpus},
        ),
        torch_config=TorchConfig(backend="nccl" if resources.gpus > 0 else "gloo"),
        run_config=RunConfig(
            name=job.kind,
            storage_path=str(scratch.resolve()),
            worker_runtime_env={"env_vars": environment},
            # Else devices that are never free are asked for again and again, without a word.
            failure_config=FailureConfig(controller_failure_limit=0),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise StageError(f"{job.kind} training failed: {error}") from error
    metrics: dict[str, Any] = json.loads(_metrics_file(job).read_text())
    return metrics


def _metrics_file(job: TrainingJob) -> Path:
    """Ray Train hands back metrics only with a checkpoint; a file says it more simply."""
    return Path(f"{job.output}.trainer") / "metrics.json"


def _train_rank(config: Mapping[str, Any]) -> None:
    """Runs in the worker process of one rank."""
    import torch
    from datasets import Dataset
    from deepspeed.runtime.engine import DeepSpeedEngine
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    job: TrainingJob = config["job"]
    # accelerate chooses DeepSpeed only for a process that looks launched by it.
    os.environ.setdefault("LOCAL_RANK", str(ray.train.get_context().get_local_rank()))
    torch.set_num_threads(job.threads)
    set_seed(job.seed)
    config_class, trainer_class = {
        "sft": (SFTConfig, SFTTrainer),
        "dpo": (DPOConfig, DPOTrainer),
    }[job.kind]
    arguments = config_class(
        **{
            "output_dir": f"{job.output}.trainer",
            "seed": job.seed,
            "bf16": job.dtype == "bfloat16",
            # The stage keeps the result and the log; TRL need not keep them once more.
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "deepspeed": merged(DEEPSPEED_DEFAULTS, job.deepspeed),
            **job.trainer,
        }
    )
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype))
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([dict(r) for r in job.records]),
        processing_class=tokenizer,
    )
    outcome = trainer.train()
    wrapped = type(trainer.model_wrapped)
    if not isinstance(trainer.model_wrapped, DeepSpeedEngine):
        raise StageError(f"TRL trained a {wrapped.__name__} instead of a DeepSpeedEngine")
    trainer.save_model(job.output)
    tokenizer.save_pretrained(job.output)
    _metrics_file(job).parent.mkdir(parents=True, exist_ok=True)
    _metrics_file(job).write_text(
        json.dumps(outcome.metrics | {"history": trainer.state.log_history})
    )
