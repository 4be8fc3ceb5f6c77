"""What the online learner minimises: loss per token, divergence from the reference, aggregation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from posttrain.losses.aggregate import (
    Denominators,
    fixed_length_mean,
    global_token_mean,
    sequence_mean,
)
from posttrain.losses.kl import k3_to_reference
from posttrain.losses.policy import (
    LossTokens,
    TokenLosses,
    cispo,
    clipped_surrogate,
    gspo,
    truncated_weight,
)
from posttrain.losses.settings import LossKind, LossSettings


class Objective(NamedTuple):
    """A loss per token, and how a batch's tokens are averaged."""

    token_losses: Callable[..., TokenLosses]
    aggregate: Callable[[Tensor, Tensor, Denominators], Tensor]


OBJECTIVES: Mapping[LossKind, Objective] = {
    "cispo": Objective(cispo, global_token_mean),  # MiniMax-M1 2025
    "grpo": Objective(clipped_surrogate, sequence_mean),  # Shao et al. 2024
    "dr_grpo": Objective(clipped_surrogate, fixed_length_mean),  # Liu et al. 2025
    "dapo": Objective(clipped_surrogate, global_token_mean),  # Yu et al. 2025
    "gspo": Objective(gspo, sequence_mean),  # Zheng et al. 2025
}


class LossShare(NamedTuple):
    """A micro-batch's share of the batch's loss, and what its N loss tokens had to do with it.

    `loss` is a scalar with gradient. `clipped` `[N]` (bool) says whose ratio met a bound, `ref_kl`
    `[N]` is the k3 divergence from the reference in nats, without gradient; None without one. Both
    are in the order of `tensor[mask]`.
    """

    loss: Tensor
    clipped: Tensor
    ref_kl: Tensor | None


def policy_loss(
    logprobs: Tensor,
    batch: Mapping[str, Tensor],
    over: Denominators,
    settings: LossSettings,
    *,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
) -> LossShare:
    """The share of one micro-batch; those of all micro-batches and ranks add up.

    Args:
        logprobs: `[R, L]`, nats, the learner's, with gradient and the sampling temperature applied.
        batch: the arrays of a `posttrain.types.MicroBatch` by name, as tensors `[R, L]`.
        over: what is divided by, for the whole batch.
        old_logprobs: `[R, L]`, the learner's before the batch's first step. Read with
            `settings.tis_max` alone: the default ratio is against the rollouts' policy, where a
            truncated weight would count the mismatch a second time.
        ref_logprobs: `[R, L]`, the reference's, exactly when `settings.kl_coefficient` is not 0.
    """
    assert (ref_logprobs is not None) == (settings.kl_coefficient > 0)
    # Prompt and padding leave here: whatever stands on them, an infinity times 0 would be NaN.
    trained = batch["loss_mask"].bool()
    rollout_logprobs = batch["rollout_logprobs"][trained]
    old = old_logprobs[trained].detach()
    tokens = LossTokens(
        logprobs=logprobs[trained],
        behaviour_logprobs=rollout_logprobs if settings.tis_max is None else old,
        advantages=batch["advantages"][trained],
        sequence=batch["sequence_ids"][trained],
    )
    objective = OBJECTIVES[settings.kind]
    losses, clipped = objective.token_losses(tokens, **settings.bounds)
    if settings.tis_max is not None:
        losses = losses * truncated_weight(old, rollout_logprobs, settings.tis_max)
    ref_kl = None
    if ref_logprobs is not None:
        ref_kl = k3_to_reference(tokens.logprobs, ref_logprobs[trained])
        losses = losses + settings.kl_coefficient * ref_kl
        ref_kl = ref_kl.detach()
    return LossShare(objective.aggregate(losses, tokens.sequence, over), clipped, ref_kl)
