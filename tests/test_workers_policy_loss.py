"""The module that the learner trains: which policies its loss compares."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from posttrain.losses.aggregate import Denominators
from posttrain.losses.diagnostics import summarise
from posttrain.losses.settings import LossSettings
from posttrain.workers.learner import PolicyLoss
from posttrain.workers.settings import LearnerSettings

OVER = Denominators(num_loss_tokens=12, num_sequences=2, max_tokens=20)


def random_batch():
    """Two sequences of a prompt and six loss tokens each."""
    torch.manual_seed(0)
    mask = torch.tensor([[0.0, 0, 1, 1, 1, 1, 1, 1]] * 2)
    return {
        "token_ids": torch.randint(3, 60, (2, 8)),
        "position_ids": torch.arange(8).repeat(2, 1),
        "loss_mask": mask,
        "rollout_logprobs": mask * (-4 - torch.rand(2, 8)),
        "advantages": mask * torch.tensor([[1.0], [-0.5]]),
        "ages": torch.zeros(2, 8, dtype=torch.int64),
    }


def policy_loss_of(model, **loss):
    settings = LearnerSettings(loss=LossSettings(**loss))
    return PolicyLoss(model, settings, temperature=0.8, max_age=1)


def test_the_reference_is_the_policy_that_entered_and_is_not_trained(tiny_policy):
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    module = policy_loss_of(model, kl_coefficient=0.1)
    assert len(list(module.parameters())) == len(list(model.parameters()))
    batch = random_batch()
    assert summarise(module(batch, OVER)[1])["ref_kl"] == 0

    before, _ = module._token_logprobs(model, batch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    after, _ = module._token_logprobs(model, batch)
    log_ratio = (before - after)[batch["loss_mask"] > 0].double()
    expected = (log_ratio.exp() - log_ratio - 1).mean()
    assert expected > 1e-3
    loss, sums = module(batch, OVER)
    torch.testing.assert_close(sums["ref_kl"].sum() / 12, expected, rtol=1e-4, atol=1e-6)
    without, _ = policy_loss_of(model)(batch, OVER)
    torch.testing.assert_close((loss - without).double(), 0.1 * expected, rtol=1e-3, atol=1e-6)


def test_a_step_starts_from_its_own_old_policy(tiny_policy):
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    metrics = [
        summarise(policy_loss_of(model, kind="dapo", tis_max=tis_max)(random_batch(), OVER)[1])
        for tis_max in (None, 2.0)
    ]
    assert metrics[0]["clipped_fraction"] > 0 == metrics[1]["clipped_fraction"]
