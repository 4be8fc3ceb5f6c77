"""The loss of one micro-batch as the learner sees it: which policies it compares."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from posttrain.losses.aggregate import Denominators
from posttrain.losses.diagnostics import diagnostic_sums
from posttrain.losses.distillation import teacher_advantages
from posttrain.losses.objective import policy_loss
from posttrain.losses.settings import LossSettings


def micro_batch_loss(
    logprobs: Tensor,
    entropy: Tensor,
    batch: Mapping[str, Tensor],
    over: Denominators,
    settings: LossSettings,
    ref_logprobs: Tensor | None,
    max_age: int,
    teacher_weight: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The micro-batch's share of the loss, and its `diagnostic_sums`; all tensors `[R, L]`. With a
    `teacher_weight`, what the teacher says joins the advantages."""
    if teacher_weight is not None and "teacher_logprobs" in batch:
        joined = teacher_advantages(
            batch["advantages"], batch["teacher_logprobs"], logprobs, teacher_weight
        )
        batch = {**batch, "advantages": joined}
    share = policy_loss(
        logprobs,
        batch,
        over,
        settings,
        # A batch trains one step, so the policy that starts it is the one that is trained.
        old_logprobs=logprobs.detach(),
        ref_logprobs=ref_logprobs,
    )
    return share.loss, diagnostic_sums(logprobs, entropy, batch, share, max_age)
