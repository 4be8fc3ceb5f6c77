"""Mixture-of-experts layers in the learner: divided over the ranks, and made whole on the way out.

Two ways. ZeRO-3 divides every tensor alike and fetches a whole layer's experts when it runs. Expert
parallelism lets each rank keep some experts for good, and tokens travel to them: DeepSpeed's
AutoEP replaces the layers of architectures that it has a preset for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from posttrain.errors import SettingsError
from posttrain.workers.gather import whole

EXPERT_PARALLEL_MODELS = ("mixtral", "qwen3_moe")
"""Those with a preset of DeepSpeed's whose layers are a router and experts, and nothing else."""


def fetch_experts_as_one(model: nn.Module) -> None:
    """For ZeRO-3. Which experts run differs between ranks, and fetching what only one of them asks
    for would never end."""
    from deepspeed.utils import set_z3_leaf_modules

    children = ((module, getattr(module, "experts", None)) for module in model.modules())
    blocks = {type(module) for module, experts in children if isinstance(experts, nn.Module)}
    if blocks:
        set_z3_leaf_modules(model, list(blocks))


def refuse_expert_parallel(config: Any, size: int, num_ranks: int) -> None:
    """SettingsError if this model's experts cannot be divided by `size`."""
    setting = f"rl.learner.expert_parallel = {size}"
    if config.model_type not in EXPERT_PARALLEL_MODELS:
        raise SettingsError(
            f"{setting} is for {', '.join(EXPERT_PARALLEL_MODELS)}, and the policy is a "
            f"{config.model_type}: leave it at 1, and take rl.learner.zero_stage = 3 if it is large"
        )
    if num_ranks % size:
        raise SettingsError(
            f"{setting} does not divide resources.learner.ranks = {num_ranks}: all groups of ranks "
            "that hold the experts once must be equally large"
        )


def divided_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> layer of those whose experts are divided for good."""
    return {n: m for n, m in model.named_modules() if getattr(m, "_is_autoep_layer", False)}


def whole_layer(layer: Any) -> dict[str, Tensor]:
    """On rank 0 the layer's tensors on the CPU, as transformers names and shapes them; empty
    elsewhere. All ranks call it at once."""
    router, experts = layer.router.gate.weight, layer.experts
    # Of this rank's E/n experts: gate [E/n, I, H], down [E/n, H, I], up [E/n, I, H].
    parts = [_of_all_ranks(weight, layer) for weight in (experts.w1, experts.w2, experts.w3)]
    with whole([router]):
        if dist.get_rank() > 0:
            return {}
        gate, down, up = (torch.cat(part).cpu() for part in parts)
        return {
            "gate.weight": router.detach().to("cpu", copy=True),
            "experts.gate_up_proj": torch.cat([gate, up], dim=1),
            "experts.down_proj": down,
        }


def _of_all_ranks(weight: Tensor, layer: Any) -> list[Tensor]:
    """`weight` of the ranks that together hold the experts once, on the first of them."""
    with whole([weight]):
        local = weight.detach().contiguous()
        first = dist.get_rank(layer.ep_group) == 0
        parts = [torch.empty_like(local) for _ in range(layer.ep_size)] if first else []
        dist.gather(local, parts or None, group=layer.ep_group, group_dst=0)
    return parts
