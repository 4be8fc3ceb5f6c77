"""Divergence from a frozen reference policy."""

from __future__ import annotations

import torch
from torch import Tensor


def k3_to_reference(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """e^d − d − 1 with d = log π_ref − log π_θ, per token (Schulman 2020; GRPO, eq. 4).

    Its expectation over π_θ is KL(π_θ ‖ π_ref), and it is never negative. Both arguments have one
    shape, usually `[R, L]`, in nats; the gradient flows through `logprobs` alone. A token that the
    reference likes and the policy has nearly given up pulls with e^d, so that little is enough to
    keep a form of answer alive that the reward would otherwise extinguish.
    """
    log_ratio = ref_logprobs.detach() - logprobs
    return torch.expm1(log_ratio) - log_ratio
