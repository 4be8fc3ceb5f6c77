"""Learning from a label and from a teacher's distribution at once, per loss token.

Every function reads the N loss tokens of a micro-batch, in one order; shares of micro-batches and
ranks add up, because what is divided by counts the whole batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from posttrain.losses.distillation_settings import Divergence


class TeacherTargets(NamedTuple):
    """The teacher's distribution q at N tokens, on K of its V ids each.

    Args:
        ids: `[N, K]`, int64; where a token has fewer, the rest has the weight 0.
        weights: `[N, K]`, non-negative. Sampled: counts / number of draws from q^τ. Top-k: q^τ of
            the k likeliest.
        tail: `[N]`, the mass of q^τ outside `ids`, for top-k; None for sampled targets, whose
            expectation is q^τ itself.
        entropy: `[N]`, nats, of q^τ, exact.
        label_logprobs: `[N]`, nats, log q of the label at τ = 1, exact.
    """

    ids: Tensor
    weights: Tensor
    tail: Tensor | None
    entropy: Tensor
    label_logprobs: Tensor


class DistillationLosses(NamedTuple):
    """Per loss token, `[N]`, nats: `ce` of the label and `divergence` from the teacher (without
    τ²), both with gradient."""

    ce: Tensor
    divergence: Tensor


def mixed_loss(
    losses: DistillationLosses, alpha: Tensor, *, temperature: float, num_loss_tokens: int | Tensor
) -> Tensor:
    """Σ [(1−α)·CE + α·τ²·KL] / num_loss_tokens, a scalar (Hinton et al. 2015, with α per token).

    `alpha` is `[N]` in [0, 1] and taken as a constant; `num_loss_tokens` counts all micro-batches
    of all ranks. τ² keeps the soft gradient's size, which falls with 1/τ².
    """
    weight = alpha.detach()
    soft = temperature**2 * losses.divergence
    return ((1 - weight) * losses.ce + weight * soft).sum() / num_loss_tokens


def distillation_losses(
    logits: Tensor,
    labels: Tensor,
    targets: TeacherTargets,
    *,
    temperature: float,
    divergence: Divergence,
    chunk_tokens: int,
) -> DistillationLosses:
    """Cross-entropy with the labels and divergence from the teacher.

    Args:
        logits: `[N, V]`, the student's.
        labels: `[N]`, int64.
        temperature: τ > 0, that of the targets; the cross-entropy is at 1.
        chunk_tokens: at most so many tokens' log-probabilities (`chunk_tokens · V`) exist at once
            beside the logits, in the backward pass too.

    Computed in fp32 (fp64 for fp64 logits).
    """
    assert divergence == "forward_kl" or targets.tail is not None, "reverse KL needs top-k targets"
    parts = [
        checkpoint(
            _chunk_losses,
            logits[here],
            labels[here],
            _slice(targets, here),
            temperature,
            divergence,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for here in _chunks(len(labels), chunk_tokens)
    ]
    return DistillationLosses(
        torch.cat([part.ce for part in parts]), torch.cat([part.divergence for part in parts])
    )


def responsibility(
    label_logprobs: Tensor, critic_logprobs: Tensor, prior: Tensor, margin: float
) -> Tensor:
    """π·q(y) / (π·q(y) + (1−π)·e^−margin·p₀(y)), `[N]`: could the teacher have said the verified
    label y, or is it wrong here? p₀ is the frozen critic; that it explains a label a little better
    than a teacher who would have said the same in other words does not make the teacher wrong.

    `label_logprobs` and `critic_logprobs` are log q(y) and log p₀(y), nats, as is `margin`; `prior`
    is π in (0, 1).
    """
    return torch.sigmoid(torch.logit(prior) + label_logprobs - critic_logprobs + margin)


def teacher_advantages(
    advantages: Tensor, teacher_logprobs: Tensor, logprobs: Tensor, weight: float
) -> Tensor:
    """advantages + weight·(log q − log π_θ), without gradient; all tensors of one shape, nats.

    For answers that the policy itself sampled: weighed by π_θ/π_rollout, as the loss does with
    every advantage, the second term's gradient is that of −KL(π_θ ‖ q) at each token (on-policy
    distillation, Agarwal et al. 2024; Lu 2025). A `teacher_logprobs` that is NaN (its score came
    too late) leaves the advantage as it is.
    """
    gap = teacher_logprobs - logprobs.detach()
    return advantages + weight * torch.nan_to_num(gap, nan=0.0)


def _chunk_losses(
    logits: Tensor,
    labels: Tensor,
    targets: TeacherTargets,
    temperature: float,
    divergence: Divergence,
) -> DistillationLosses:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logprobs = logits.log_softmax(dim=-1)
    ce = -logprobs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    softened = logprobs if temperature == 1 else (logits / temperature).log_softmax(dim=-1)
    return DistillationLosses(ce, DIVERGENCES[divergence](softened, targets))


def _forward_kl(logprobs: Tensor, targets: TeacherTargets) -> Tensor:
    """Σ q·log q − Σ q·log p, its first part exact. With a tail, q and p each count as one id what
    lies outside `ids`."""
    kept = logprobs.gather(-1, targets.ids)
    cross_entropy = -(targets.weights * kept).sum(dim=-1)
    if targets.tail is None:
        return cross_entropy - targets.entropy
    tail = targets.tail
    negentropy = torch.xlogy(targets.weights, targets.weights).sum(dim=-1) + torch.xlogy(tail, tail)
    return negentropy + cross_entropy - tail * _tail_logprobs(logprobs, targets)


def _reverse_kl(logprobs: Tensor, targets: TeacherTargets) -> Tensor:
    """Σ p·(log p − log q) over the kept ids, and the tail as one more."""
    assert targets.tail is not None
    kept = logprobs.gather(-1, targets.ids)
    inside = (kept.exp() * (kept - _floored_log(targets.weights))).sum(dim=-1)
    tail = _tail_logprobs(logprobs, targets)
    return inside + tail.exp() * (tail - _floored_log(targets.tail))


def _floored_log(probabilities: Tensor) -> Tensor:
    """What the teacher's softmax rounded to 0 is unlikely, not impossible."""
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()


def _tail_logprobs(logprobs: Tensor, targets: TeacherTargets) -> Tensor:
    """log of the student's mass outside the kept ids, `[N]`; finite even where there is none."""
    masked = logprobs.scatter(-1, targets.ids, torch.finfo(logprobs.dtype).min)
    return masked.logsumexp(dim=-1)


DIVERGENCES = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl}


def _slice(targets: TeacherTargets, here: slice) -> TeacherTargets:
    return TeacherTargets(*(None if part is None else part[here] for part in targets))  # type: ignore[arg-type]


def _chunks(length: int, chunk_tokens: int) -> list[slice]:
    starts = range(0, max(length, 1), chunk_tokens)
    return [slice(start, start + chunk_tokens) for start in starts]
