"""The policy that entered the stage, kept for the divergence from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from posttrain.workers.learner_config import common_config, device
from posttrain.workers.policy_model import PackedPolicy
from posttrain.workers.settings import LearnerSettings

Reference = Callable[[Mapping[str, Tensor]], Tensor]
"""From a micro-batch to `ref_logprobs`, `[R, L]`. All ranks call it equally often."""


def frozen_reference(model: Any, settings: LearnerSettings, temperature: float) -> Reference:
    """A model of its own, divided over the ranks as the policy is."""
    policy = PackedPolicy(model.requires_grad_(False).eval(), settings.logprob_chunk_tokens)
    if settings.zero_stage < 3:
        return batch_scorer(policy.to(device()), temperature)
    import deepspeed

    engine, _, _, _ = deepspeed.initialize(model=policy, config=common_config(settings))
    return batch_scorer(engine, temperature)


def adapter_reference(engine: Any, adapted: Any, temperature: float) -> Reference:
    """The policy itself with its adapter switched off: costs a forward pass and no memory."""
    score = batch_scorer(engine, temperature)

    def reference(batch: Mapping[str, Tensor]) -> Tensor:
        with adapted.disable_adapter():
            return score(batch)

    return reference


def batch_scorer(policy: Any, temperature: float) -> Reference:
    """Log-probabilities of micro-batches under `policy` as it then is, without gradient."""

    @torch.no_grad()
    def score(batch: Mapping[str, Tensor]) -> Tensor:
        logprobs: Tensor
        logprobs, _ = policy(
            batch["token_ids"], batch["position_ids"], temperature, batch["sequence_ids"]
        )
        return logprobs

    return score
