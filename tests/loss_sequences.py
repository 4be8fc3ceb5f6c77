"""Sequences with random log-probabilities, and micro-batches in which they are laid out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.losses.aggregate import Denominators
from posttrain.losses.objective import LossShare, policy_loss
from posttrain.losses.settings import LossSettings

JUNK = float("nan")
"""What the learner's log-probabilities are where nothing is learned: it must not matter."""


class Scored(NamedTuple):
    """One sequence of T tokens, every tensor `[T]` in float64; `logprobs` is a leaf.

    All log-probabilities are `JUNK` where `loss_mask` is 0, but the engine's: they are 0 there.
    """

    logprobs: Tensor
    rollout_logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    loss_mask: Tensor


def random_sequence(seed: int, mask: Sequence[bool], *, drift: float, mismatch: float) -> Scored:
    """`drift` is the standard deviation of log π_θ/π_old, `mismatch` of log π_old/π_rollout."""
    generator = torch.Generator().manual_seed(seed)
    loss_mask = torch.tensor(mask)

    def noise() -> Tensor:
        return torch.randn(len(mask), generator=generator, dtype=torch.float64)

    logprobs = -1.5 + 0.3 * noise()
    old_logprobs = logprobs + drift * noise()
    return Scored(
        logprobs=logprobs.where(loss_mask, JUNK).requires_grad_(),
        rollout_logprobs=(old_logprobs + drift * noise()).where(loss_mask, 0.0),
        old_logprobs=old_logprobs.where(loss_mask, JUNK),
        ref_logprobs=(logprobs + 0.3 * noise()).where(loss_mask, JUNK),
        advantages=noise()[0] * loss_mask,
        loss_mask=loss_mask.float(),
    )


def denominators(sequences: Sequence[Scored], max_tokens: int) -> Denominators:
    num_loss_tokens = int(sum(sequence.loss_mask.sum() for sequence in sequences))
    return Denominators(num_loss_tokens, len(sequences), max_tokens)


def share_of(
    rows: Sequence[Sequence[Scored]],
    over: Denominators,
    settings: LossSettings,
    *,
    num_padding: int = 0,
) -> LossShare:
    """The share of a micro-batch of packed rows, the longest padded by `num_padding` tokens."""
    lengths = [sum(map(_length, row)) for row in rows]
    padding = [max(lengths) + num_padding - length for length in lengths]

    def laid_out(field: str, filler: float) -> Tensor:
        return torch.stack(
            [
                torch.cat([*(getattr(s, field) for s in row), torch.full((missing,), filler)])
                for row, missing in zip(rows, padding, strict=True)
            ]
        )

    numbers = itertools.count()
    sequence_ids = [
        torch.cat([torch.full((n,), next(numbers)) for n in (*map(_length, row), missing)])
        for row, missing in zip(rows, padding, strict=True)
    ]
    batch = {
        "sequence_ids": torch.stack(sequence_ids),
        "loss_mask": laid_out("loss_mask", 0.0),
        "rollout_logprobs": laid_out("rollout_logprobs", 0.0),
        "advantages": laid_out("advantages", 0.0),
    }
    return policy_loss(
        laid_out("logprobs", JUNK),
        batch,
        over,
        settings,
        old_logprobs=laid_out("old_logprobs", JUNK),
        ref_logprobs=laid_out("ref_logprobs", JUNK) if settings.kl_coefficient else None,
    )


def _length(sequence: Scored) -> int:
    return len(sequence.loss_mask)


def gradients(loss: Tensor, sequences: Sequence[Scored]) -> list[Tensor]:
    """d loss / d logprobs of each sequence, `[T]`; 0 for one that the loss does not know."""
    leaves = [sequence.logprobs for sequence in sequences]
    return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
