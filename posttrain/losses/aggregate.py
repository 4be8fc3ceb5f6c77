"""Losses `[N]` of one micro-batch's loss tokens to its share of the batch's loss, a scalar.

Every denominator counts the whole batch and is fixed before the split, so the shares of all
micro-batches and ranks add up to the batch's loss, whatever rows, padding and order they have.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Denominators(NamedTuple):
    """Of the whole batch, all ranks included; `max_tokens` is the limit of a completion."""

    num_loss_tokens: int
    num_sequences: int
    max_tokens: int


def global_token_mean(losses: Tensor, _sequence: Tensor, over: Denominators) -> Tensor:
    """Every token weighs the same: sum / num_loss_tokens (DAPO, Yu et al. 2025)."""
    return losses.sum() / over.num_loss_tokens


def sequence_mean(losses: Tensor, sequence: Tensor, over: Denominators) -> Tensor:
    """Every sequence weighs the same, its tokens share the weight (GRPO, Shao et al. 2024).

    `sequence` `[N]` numbers the sequence of each token; no sequence spans two micro-batches.
    """
    return (losses / torch.bincount(sequence)[sequence]).sum() / over.num_sequences


def fixed_length_mean(losses: Tensor, _sequence: Tensor, over: Denominators) -> Tensor:
    """Sum over B·L_max, so that length changes no token's weight (Dr.GRPO, Liu et al. 2025)."""
    return losses.sum() / (over.num_sequences * over.max_tokens)
