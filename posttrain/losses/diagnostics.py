"""How far the learner is from what the engine sampled from, by the age of the tokens.

Sums, not means: those of micro-batches and ranks add up, then `summarise` divides once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from posttrain.losses.objective import LossShare


@torch.no_grad()
def diagnostic_sums(
    logprobs: Tensor,
    entropy: Tensor,
    batch: Mapping[str, Tensor],
    share: LossShare,
    max_age: int,
) -> dict[str, Tensor]:
    """Sums over the loss tokens of one micro-batch.

    `logprobs` and `entropy` are `[R, L]`; `batch` holds the arrays of a `MicroBatch` by name, and
    `share` is what `policy_loss` made of both.

    Each sum is a `[max_age + 1]` float64 tensor by age in optimizer steps, the last one for
    `max_age` and older: `tokens`, `weight` (w = r = π_θ/π_rollout), `weight_squared`, `k3`
    (r − 1 − log r, whose expectation is KL(π_rollout ‖ π_θ), Schulman 2020), `clipped`, `entropy`,
    and with a reference `ref_kl`.
    """
    trained = batch["loss_mask"].bool()
    log_ratio = (logprobs[trained] - batch["rollout_logprobs"][trained]).double()
    weight = log_ratio.exp()
    per_token = {
        "tokens": torch.ones_like(weight),
        "weight": weight,
        "weight_squared": weight.square(),
        "k3": torch.expm1(log_ratio) - log_ratio,
        "clipped": share.clipped.double(),
        "entropy": entropy[trained].double(),
    }
    if share.ref_kl is not None:
        per_token["ref_kl"] = share.ref_kl.double()
    bins = batch["ages"][trained].clamp(max=max_age)
    return {
        name: torch.zeros(max_age + 1, dtype=torch.float64, device=bins.device).index_add_(
            0, bins, values
        )
        for name, values in per_token.items()
    }


def summarise(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics of a step from the added `diagnostic_sums` of its micro-batches and ranks.

    `ess` is (Σw)²/(N·Σw²), 1 when on-policy; `k3`, `clipped_fraction`, `entropy` and `ref_kl` are
    means per token. `k3_age_0` is the mismatch of engine and learner at equal weights. Ages without
    tokens are absent.
    """
    tokens = sums["tokens"]
    total = float(tokens.sum())
    metrics = {
        "ess": float(sums["weight"].sum() ** 2 / (total * sums["weight_squared"].sum())),
        "k3": float(sums["k3"].sum()) / total,
        "clipped_fraction": float(sums["clipped"].sum()) / total,
        "entropy": float(sums["entropy"].sum()) / total,
    }
    if "ref_kl" in sums:
        metrics["ref_kl"] = float(sums["ref_kl"].sum()) / total
    for age in torch.nonzero(tokens).flatten().tolist():
        metrics[f"k3_age_{age}"] = float(sums["k3"][age] / tokens[age])
        metrics[f"clipped_fraction_age_{age}"] = float(sums["clipped"][age] / tokens[age])
    return metrics
