"""Policy-gradient losses per token, to be reduced by `posttrain.losses.aggregate`.

All tensors have one shape, usually `[R, L]`. The ratio is r = π_θ/π_rollout, the learner's policy
over what the engine sampled from: recomputing π_old when a step starts would make every ratio 1
and hide the lag. For the same reason a truncated importance weight on top would count it twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.losses.settings import LossKind


class TokenLosses(NamedTuple):
    """`losses` with gradient, and the tokens (bool) whose ratio the loss clipped."""

    losses: Tensor
    clipped: Tensor


def cispo(
    logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, c_max: float = 5.0
) -> TokenLosses:
    """−sg(min(r, c_max))·A·log π_θ (CISPO, MiniMax 2025): a clipped token keeps its gradient."""
    ratio = torch.exp(logprobs.detach() - rollout_logprobs)
    weight = ratio.clamp(max=c_max)
    return TokenLosses(-weight * advantages * logprobs, ratio > c_max)


def grpo(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
) -> TokenLosses:
    """−min(r·A, clip(r, 1−eps_low, 1+eps_high)·A) (GRPO, Shao et al. 2024).

    With `sequence_mean` this is GRPO, with `fixed_length_mean` Dr.GRPO, with `eps_high=0.28` and
    `global_token_mean` DAPO's loss. A clipped token has no gradient.
    """
    ratio = torch.exp(logprobs - rollout_logprobs)
    surrogate = ratio * advantages
    bounded = ratio.clamp(1 - eps_low, 1 + eps_high) * advantages
    return TokenLosses(-torch.minimum(surrogate, bounded), bounded < surrogate)


LOSSES: Mapping[LossKind, Callable[..., TokenLosses]] = {"cispo": cispo, "grpo": grpo}
