"""Log-probabilities and entropies of the tokens of a packed batch, without all logits at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint


def token_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    temperature: float,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token under softmax(hidden · Wᵀ / temperature), and its entropy.

    Args:
        hidden: `[R, L, H]`, the last hidden states, after the final norm.
        lm_head_weight: `[V, H]`.
        token_ids: `[R, L]`.
        temperature: the one that the rollouts were sampled with, > 0.
        chunk_tokens: at most `chunk_tokens · V` logits exist at once, in the backward pass too
            (each chunk is computed again there), with up to four tensors of that size beside them.

    Returns:
        `logprobs` and `entropy`, `[R, L]`, nats, in fp32 (fp64 for fp64 input) whatever the
        model's dtype: bf16 logits destabilise learning from off-policy data. Both stand at the
        index of the token they are about, computed from the hidden state before it, so the first
        token of every sequence has no meaningful value (0 at index 0). `entropy` has no gradient.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    weight = lm_head_weight.to(dtype)
    sources = torch.split(hidden[:, :-1].flatten(0, 1), chunk_tokens)
    targets = torch.split(token_ids[:, 1:].flatten(), chunk_tokens)
    chunks = [
        checkpoint(
            _chunk_logprobs,
            source,
            weight,
            target,
            temperature,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for source, target in zip(sources, targets, strict=True)
    ]
    rows = token_ids.shape[0]
    logprobs = torch.cat([chunk[0] for chunk in chunks]).view(rows, -1)
    entropy = torch.cat([chunk[1] for chunk in chunks]).view(rows, -1)
    return pad(logprobs, (1, 0)), pad(entropy, (1, 0))


def _chunk_logprobs(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = hidden.to(weight.dtype) @ weight.T / temperature
    normaliser = logits.logsumexp(dim=-1)
    logprobs = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1) - normaliser
    # Last, because recomputation in the backward pass stops after the last tensor it needs.
    with torch.no_grad():
        probabilities = (logits - normaliser.unsqueeze(-1)).exp_()
        entropy = normaliser - (probabilities * logits).sum(dim=-1)
    return logprobs, entropy
