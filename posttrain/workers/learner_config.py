"""DeepSpeed's configuration, and what must be set before DeepSpeed is imported."""

from __future__ import annotations

import os
import socket
from typing import Any

import numpy as np
import torch

from posttrain.workers.extensions import prepare_extensions
from posttrain.workers.settings import LearnerSettings, merged


def free_address() -> str:
    """host:port at which rank 0 of a new group may be met, on the machine of the caller."""
    import ray

    host = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"


def prepare_process(
    settings: LearnerSettings, *, rank: int, num_ranks: int, address: str, seed: int
) -> None:
    """Threads, seeds, and the environment by which the ranks find each other."""
    import random

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(settings.threads)
        prepare_extensions()
    host, _, port = address.rpartition(":")
    os.environ |= {
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "RANK": str(rank),
        # A Ray actor sees its own GPU only, as the first.
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(num_ranks),
    }
    # Adapters start from random weights, the same on all ranks.
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def training_config(settings: LearnerSettings, model_type: str) -> dict[str, Any]:
    """For `deepspeed.initialize` of the trained policy, of transformers' `model_type`."""
    config: dict[str, Any] = common_config(settings) | {
        "gradient_clipping": settings.max_grad_norm,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": settings.learning_rate,
                "betas": list(settings.betas),
                "weight_decay": settings.weight_decay,
                # The fused CPU kernel would have to be compiled first.
                "torch_adam": True,
            },
        },
    }
    if settings.expert_parallel > 1:
        config["expert_parallel"] = {
            "enabled": True,
            "autoep_size": settings.expert_parallel,
            "preset_model": model_type,  # DeepSpeed calls its presets after them
        }
    if settings.dtype == "bfloat16":
        # Many small shares add up to one gradient; bf16 would round each of them.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return merged(config, settings.deepspeed)


def common_config(settings: LearnerSettings) -> dict[str, Any]:
    """What holds for a policy that is only loaded or scored too: how its weights are divided."""
    zero = settings.deepspeed.get("zero_optimization", {}) | {"stage": settings.zero_stage}
    return {
        "train_micro_batch_size_per_gpu": 1,
        # Boundaries are set by hand: micro-batches are cut by tokens, their number varies, and the
        # loss already carries the batch's denominator.
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": settings.dtype == "bfloat16"},
    }
