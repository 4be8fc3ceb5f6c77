"""Which policies the learner's loss compares."""

from __future__ import annotations

import torch

from posttrain.losses.aggregate import Denominators
from posttrain.losses.diagnostics import summarise
from posttrain.losses.settings import LossSettings
from posttrain.workers.policy_loss import micro_batch_loss


def test_a_step_starts_from_its_own_old_policy():
    torch.manual_seed(0)
    mask = torch.tensor([[0.0, 0, 1, 1, 1, 1, 1, 1]] * 2)
    batch = {
        "sequence_ids": torch.tensor([[0], [1]]).repeat(1, 8),
        "loss_mask": mask,
        "rollout_logprobs": mask * (-4 - torch.rand(2, 8)),
        "advantages": mask * torch.tensor([[1.0], [-0.5]]),
        "ages": torch.zeros(2, 8, dtype=torch.int64),
    }
    over = Denominators(num_loss_tokens=12, num_sequences=2, max_tokens=20)
    logprobs = -2 - torch.rand(2, 8)
    entropy = torch.ones(2, 8)

    def metrics(tis_max):
        settings = LossSettings(kind="dapo", tis_max=tis_max)
        _, sums = micro_batch_loss(logprobs, entropy, batch, over, settings, None, 1)
        return summarise(sums)

    assert metrics(None)["clipped_fraction"] > 0 == metrics(2.0)["clipped_fraction"]
