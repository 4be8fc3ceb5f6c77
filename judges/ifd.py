"""Instruction-following difficulty: how little the prompt helps to predict the answer.

Experimental, like every figure that is made from a model's likelihoods alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean


def ifd(conditioned: Sequence[float], alone: Sequence[float]) -> float:
    """mean NLL(answer | prompt) / mean NLL(answer) (Li et al. 2024, arXiv:2308.12032, eq. 3).

    Both are log-probabilities (nats) of the same answer tokens, the first left out: alone, nothing
    stands before it. Above 1 the prompt misleads. Raises ValueError for different tokens or none;
    an answer that is certain by itself (NLL 0) has 1 if it stays so, else infinity.
    """
    if len(conditioned) != len(alone) or not alone:
        raise ValueError(
            f"{len(conditioned)} log-probabilities with the prompt and {len(alone)} without: the "
            "same answer tokens are needed, one at least"
        )
    with_prompt, without = -fmean(conditioned), -fmean(alone)
    if without == 0.0:
        return 1.0 if with_prompt == 0.0 else float("inf")
    return with_prompt / without
