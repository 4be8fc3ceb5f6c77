"""Losses per token `[R, L]` of one micro-batch to its share of the batch's loss, a scalar.

Every denominator counts the whole batch and is fixed before the split, so the shares of all
micro-batches add up to the batch's loss, and masking a token never makes another one heavier.
"""

from __future__ import annotations

import torch
from torch import Tensor


def global_token_mean(losses: Tensor, mask: Tensor, num_loss_tokens: int) -> Tensor:
    """Every token weighs the same (DAPO, Yu et al. 2025)."""
    return (losses * mask).sum() / num_loss_tokens


def sequence_mean(losses: Tensor, mask: Tensor, position_ids: Tensor, num_sequences: int) -> Tensor:
    """Every sequence weighs the same, its tokens share the weight (GRPO, Shao et al. 2024).

    `position_ids` `[R, L]` tell the packed sequences apart: each starts at 0.
    """
    sequence = (position_ids == 0).flatten().cumsum(0) - 1
    tokens = torch.zeros(losses.numel(), dtype=losses.dtype, device=losses.device)
    tokens.index_add_(0, sequence, mask.flatten().to(losses.dtype))
    # A prompt's or padding's tokens may stand in a sequence without a single loss token.
    weight = mask / tokens[sequence].view_as(losses).clamp(min=1)
    return (losses * weight).sum() / num_sequences


def fixed_length_mean(losses: Tensor, mask: Tensor, num_sequences: int, max_tokens: int) -> Tensor:
    """Sum over B·L_max (Dr.GRPO, Liu et al. 2025): `max_tokens` is the limit of a completion."""
    return (losses * mask).sum() / (num_sequences * max_tokens)
