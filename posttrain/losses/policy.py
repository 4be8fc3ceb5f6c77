"""Policy-gradient losses per loss token, to be reduced by `posttrain.losses.aggregate`.

The ratio is π_θ over the behaviour policy. That is what the engine sampled from, unless a method
keeps its own π_old: recomputing π_old when a step starts makes every ratio 1 and hides the lag.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LossTokens(NamedTuple):
    """The N loss tokens of one micro-batch, in any order; every tensor `[N]`.

    `logprobs` (with gradient) and `behaviour_logprobs` are in nats, `advantages` in units of
    reward. Tokens of one sequence share its number in `sequence` (int64, ≥ 0).
    """

    logprobs: Tensor
    behaviour_logprobs: Tensor
    advantages: Tensor
    sequence: Tensor


class TokenLosses(NamedTuple):
    """`losses` `[N]` with gradient, and which tokens' ratio the loss `clipped` (`[N]`, bool)."""

    losses: Tensor
    clipped: Tensor


def cispo(tokens: LossTokens, *, c_max: float) -> TokenLosses:
    """−sg(min(r, c_max))·A·log π_θ, `[N]`, r per token (CISPO, MiniMax-M1 2025).

    The weight is detached, so a clipped token keeps a gradient, of c_max·A.
    """
    ratio = torch.exp(tokens.logprobs.detach() - tokens.behaviour_logprobs)
    weight = ratio.clamp(max=c_max)
    return TokenLosses(-weight * tokens.advantages * tokens.logprobs, ratio > c_max)


def clipped_surrogate(tokens: LossTokens, *, eps_low: float, eps_high: float) -> TokenLosses:
    """−min(r·A, clip(r, 1−eps_low, 1+eps_high)·A), `[N]`, r per token (GRPO, Shao et al. 2024).

    A clipped token has no gradient.
    """
    ratio = torch.exp(tokens.logprobs - tokens.behaviour_logprobs)
    return _clipped(ratio, tokens.advantages, eps_low, eps_high)


def gspo(tokens: LossTokens, *, eps_low: float, eps_high: float) -> TokenLosses:
    """The clipped surrogate of s = exp(mean log r), one ratio a sequence (GSPO, Zheng et al. 2025).

    `[N]`, equal over the tokens of a sequence: their mean is the sequence's loss. The mean of log r
    is over loss tokens, so s keeps the scale of a token's ratio however long the sequence is.
    """
    log_ratio = tokens.logprobs - tokens.behaviour_logprobs
    lengths = torch.bincount(tokens.sequence)
    sums = torch.zeros(len(lengths), dtype=log_ratio.dtype, device=log_ratio.device)
    sums = sums.index_add(0, tokens.sequence, log_ratio)
    ratio = torch.exp(sums[tokens.sequence] / lengths[tokens.sequence])
    return _clipped(ratio, tokens.advantages, eps_low, eps_high)


def truncated_weight(old_logprobs: Tensor, rollout_logprobs: Tensor, tis_max: float) -> Tensor:
    """min(π_old/π_rollout, tis_max) per token, without gradient (TIS, Yao et al. 2025).

    For ratios against π_old alone: on top of π_θ/π_rollout it would count the mismatch twice.
    """
    return torch.exp(old_logprobs.detach() - rollout_logprobs).clamp(max=tis_max)


def _clipped(ratio: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> TokenLosses:
    surrogate = ratio * advantages
    bounded = ratio.clamp(1 - eps_low, 1 + eps_high) * advantages
    return TokenLosses(-torch.minimum(surrogate, bounded), bounded < surrogate)
