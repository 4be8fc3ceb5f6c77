"""Whether sequences that are packed into one row stay apart in this very model, and whether it
computes in training what it computes in evaluation.

Transformers tells sequences apart by their positions, but an architecture may not hand them on to
its attention. Then each sequence would silently see those before it. And an architecture may add
noise in training that no setting switches off. Then the loss's ratio would measure it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from posttrain.errors import ModelError
from posttrain.packing import pack
from posttrain.types import MicroBatch, PolicyVersion, TrainingSample

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}
"""Nats, of the median token: rounding, and experts that are chosen otherwise because of it, move
few tokens far; what is seen and should not be moves nearly all of them."""
NOISE = {"float32": 1e-4, "bfloat16": 0.05}
"""Likewise between training and evaluation, which compute the same in the same order."""
LENGTHS = ((5, 9), (5, 8), (3, 7))
"""Prompt and answer; the first two have one prompt."""


def check_packing(
    model_path: str,
    score: Callable[[MicroBatch], Tensor],
    *,
    vocab_size: int,
    dtype: str,
    share_prompts: bool,
) -> None:
    """`score` gives log-probabilities `[R, L]`; all ranks call this at once.

    Raises:
        ModelError: a sequence's log-probabilities depend on what is packed beside it.
    """
    samples = _samples(vocab_size)
    alone = [_answers([sample], score, share_prompts=False) for sample in samples]
    # Where prompts are shared, rows in which none is are laid out as ever.
    for shared in (False, True) if share_prompts else (False,):
        together = _answers(samples, score, share_prompts=shared)
        for answers in alone:
            for tokens, logprobs in answers.items():
                moved = (together[tokens] - logprobs).abs().median().item()
                if not moved <= TOLERANCE[dtype]:
                    raise ModelError(
                        f"{model_path!r}: sequences that are packed into one row see each other "
                        f"(by {moved:.2g} nats) as transformers computes this architecture, so the "
                        "learner cannot train it; take another one, or mend its attention mask"
                    )


def check_noise(
    model_path: str,
    score: Callable[[MicroBatch], Tensor],
    score_in_training: Callable[[MicroBatch], Tensor],
    *,
    vocab_size: int,
    dtype: str,
) -> None:
    """Both give log-probabilities `[R, L]`, the second in training mode; all ranks call this at
    once, before an adapter that has dropout changes anything.

    Raises:
        ModelError: they differ.
    """
    samples = _samples(vocab_size)
    quiet = _answers(samples, score, share_prompts=False)
    noisy = _answers(samples, score_in_training, share_prompts=False)
    moved = torch.cat([(noisy[t] - quiet[t]).abs() for t in quiet]).median().item()
    if not moved <= NOISE[dtype]:
        raise ModelError(
            f"{model_path!r}: in training this architecture computes other log-probabilities than "
            f"in evaluation (by {moved:.2g} nats), such as by experts that are drawn at random, "
            "and the engines sample without that, so the learner cannot train it; take another one"
        )


def _samples(vocab_size: int) -> list[TrainingSample]:
    rng = np.random.default_rng(0)
    prompt = rng.integers(vocab_size, size=max(length for length, _ in LENGTHS))
    samples = []
    for prompt_length, answer_length in LENGTHS:
        answer = rng.integers(vocab_size, size=answer_length)
        mask = np.r_[np.zeros(prompt_length), np.ones(answer_length)].astype(np.float32)
        samples.append(
            TrainingSample(
                token_ids=np.r_[prompt[:prompt_length], answer],
                loss_mask=mask,
                rollout_logprobs=np.zeros_like(mask),
                advantages=np.zeros_like(mask),
                oldest_version=PolicyVersion(0, 0),
            )
        )
    return samples


def _answers(
    samples: Sequence[TrainingSample],
    score: Callable[[MicroBatch], Tensor],
    *,
    share_prompts: bool,
) -> Mapping[tuple[int, ...], Tensor]:
    """Log-probabilities of each answer's tokens, by its tokens; all samples in one row."""
    tokens = sum(len(sample.token_ids) for sample in samples)
    (batch,) = pack(
        samples,
        row_tokens=tokens,
        micro_tokens=tokens,
        pad_token_id=0,
        current=PolicyVersion(0, 0),
        share_prompts=share_prompts,
    ).micro_batches
    logprobs = score(batch)
    found = {}
    for number in range(int(batch.sequence_ids.max()) + 1):
        own = (batch.sequence_ids == number) & (batch.loss_mask > 0)
        if own.any():
            found[tuple(batch.token_ids[own].tolist())] = logprobs[torch.from_numpy(own)]
    return found
