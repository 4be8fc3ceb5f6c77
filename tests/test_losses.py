"""Policy losses, their aggregation, divergence from a reference and settings, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_sequences import denominators, gradients, random_sequence, share_of
from pydantic import ValidationError

from posttrain.losses.aggregate import (
    Denominators,
    fixed_length_mean,
    global_token_mean,
    sequence_mean,
)
from posttrain.losses.kl import k3_to_reference
from posttrain.losses.objective import OBJECTIVES, policy_loss
from posttrain.losses.policy import LossTokens, cispo, clipped_surrogate, gspo, truncated_weight
from posttrain.losses.settings import LossSettings


def doubles(values, requires_grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=requires_grad)


def tokens_of(ratio, advantages, sequence=None, logprobs=None):
    """Tokens with the ratios `ratio`, by default of one sequence and with log π_θ = −1."""
    logprobs = doubles([-1.0] * len(ratio) if logprobs is None else logprobs, requires_grad=True)
    return LossTokens(
        logprobs=logprobs,
        behaviour_logprobs=logprobs.detach() - doubles(ratio).log(),
        advantages=doubles(advantages),
        sequence=torch.tensor(sequence or [0] * len(ratio)),
    )


# --- losses ------------------------------------------------------------------------------------


def test_dapo_clipping_by_hand():
    tokens = tokens_of([1.5, 0.5, 1.5, 0.5], [1.0, 1.0, -1.0, -1.0])
    losses, clipped = clipped_surrogate(tokens, **LossSettings(kind="dapo").bounds)
    np.testing.assert_allclose(losses.detach(), [-1.28, -0.5, 1.5, 0.8], rtol=1e-12)
    assert clipped.tolist() == [True, False, False, True]
    losses.sum().backward()
    # d r / d log π = r, where nothing is clipped.
    np.testing.assert_allclose(tokens.logprobs.grad, [0, -0.5, 1.5, 0], rtol=1e-12)


def test_the_clipped_surrogates_gradient_is_its_derivative():
    tokens = random_tokens(40, spread=0.5)

    def losses(logprobs):
        return clipped_surrogate(
            tokens._replace(logprobs=logprobs), eps_low=0.2, eps_high=0.2
        ).losses

    assert torch.autograd.gradcheck(losses, [tokens.logprobs])


def random_tokens(num_tokens, spread):
    generator = torch.Generator().manual_seed(0)
    logprobs, noise, advantages = torch.randn(
        3, num_tokens, generator=generator, dtype=torch.float64
    )
    return LossTokens(
        logprobs=logprobs.clone().requires_grad_(),
        behaviour_logprobs=logprobs + spread * noise,
        advantages=advantages,
        sequence=torch.arange(num_tokens) % 7,
    )


def test_cispo_by_hand():
    # The third ratio, 8, is cut down to 5 and its token keeps a gradient.
    tokens = tokens_of(
        [1.0, 2.0, 8.0, 0.5], [1.0, 1.0, 1.0, -2.0], logprobs=[-1.0, -0.5, -2.0, -1.0]
    )
    losses, clipped = cispo(tokens, **LossSettings().bounds)
    np.testing.assert_allclose(losses.detach(), [1.0, 1.0, 10.0, -1.0], rtol=1e-12)
    assert clipped.tolist() == [False, False, True, False]
    losses.sum().backward()
    np.testing.assert_allclose(tokens.logprobs.grad, [-1.0, -2.0, -5.0, 1.0], rtol=1e-12)


def test_gspo_by_hand():
    # Sequences interleaved, with geometric means (4·1)^½ = 2 and (.5·.5·2)^⅓ = .7937.
    tokens = tokens_of(
        [4.0, 0.5, 1.0, 0.5, 2.0], [1.0, -1.0, 1.0, -1.0, -1.0], sequence=[0, 2, 0, 2, 2]
    )
    s = 0.5 ** (1 / 3)
    losses, clipped = gspo(tokens, eps_low=0.5, eps_high=2.0)
    np.testing.assert_allclose(losses.detach(), [-2, s, -2, s, s], rtol=1e-12)
    assert not clipped.any()
    sequence_mean(losses, tokens.sequence, Denominators(5, 2, 10)).backward()
    # −s·A/|y| per token, over two sequences.
    np.testing.assert_allclose(
        tokens.logprobs.grad, np.array([-2 / 2, s / 3, -2 / 2, s / 3, s / 3]) / 2, rtol=1e-12
    )
    losses, clipped = gspo(tokens, **LossSettings(kind="gspo").bounds)
    np.testing.assert_allclose(
        losses.detach(), [-1.0004, 0.9997, -1.0004, 0.9997, 0.9997], rtol=1e-12
    )
    assert clipped.all()


def test_gspo_with_one_token_a_sequence_is_the_token_surrogate():
    tokens = random_tokens(20, spread=0.5)._replace(sequence=torch.arange(20))
    bounds = {"eps_low": 0.2, "eps_high": 0.28}
    torch.testing.assert_close(gspo(tokens, **bounds), clipped_surrogate(tokens, **bounds))


def test_a_truncated_weight_by_hand_has_no_gradient():
    old_logprobs = doubles([-1.0, -1.0, -1.0], requires_grad=True)
    weight = truncated_weight(old_logprobs, -1 - doubles([0.5, 1.0, 4.0]).log(), tis_max=2.0)
    np.testing.assert_allclose(weight, [0.5, 1.0, 2.0], rtol=1e-12)
    assert not weight.requires_grad


# --- aggregation -------------------------------------------------------------------------------


def test_aggregates_by_hand():
    losses = doubles([1.0, 1.0, *[-0.5] * 6])
    sequence = torch.tensor([1, 1, *[3] * 6])  # a prompt and padding without loss token between
    over = Denominators(num_loss_tokens=8, num_sequences=2, max_tokens=10)
    assert sequence_mean(losses, sequence, over).item() == pytest.approx(0.25)
    assert global_token_mean(losses, sequence, over).item() == pytest.approx(-0.125)
    assert fixed_length_mean(losses, sequence, over).item() == pytest.approx(-0.05)


TOKEN_WEIGHTS = {
    "cispo": (1 / 5, 1 / 5),
    "grpo": (1 / (2 * 2), 1 / (2 * 3)),
    "dr_grpo": (1 / (2 * 10), 1 / (2 * 10)),
    "dapo": (1 / 5, 1 / 5),
    "gspo": (1 / (2 * 2), 1 / (2 * 3)),
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_on_policy_every_loss_has_the_policy_gradient(kind):
    """−A by the weight of a token in sequences of two and three loss tokens, at a limit of ten."""
    sequences = [
        random_sequence(seed, mask, drift=0.0, mismatch=0.0)
        for seed, mask in enumerate([[False, True, True], [False, True, False, True, True]])
    ]
    over = denominators(sequences, max_tokens=10)
    assert over == (5, 2, 10)
    share = share_of([sequences], over, LossSettings(kind=kind))
    assert not share.clipped.any()
    for sequence, weight, gradient in zip(
        sequences, TOKEN_WEIGHTS[kind], gradients(share.loss, sequences), strict=True
    ):
        torch.testing.assert_close(gradient, -weight * sequence.advantages * sequence.loss_mask)


# --- old policy and reference ------------------------------------------------------------------


def one_token(logprob, rollout, old, ref=None, **changes):
    """Share of a batch of one prompt token and one loss token with advantage 3."""
    logprobs = doubles([[-7.0, logprob]], requires_grad=True)
    share = policy_loss(
        logprobs,
        {
            "sequence_ids": torch.tensor([[0, 0]]),
            "loss_mask": torch.tensor([[0.0, 1.0]]),
            "rollout_logprobs": doubles([[0.0, rollout]]),
            "advantages": doubles([[0.0, 3.0]]),
        },
        Denominators(num_loss_tokens=4, num_sequences=1, max_tokens=10),
        LossSettings(**changes),
        old_logprobs=doubles([[0.0, old]]),
        ref_logprobs=None if ref is None else doubles([[-7.0, ref]]),
    )
    (gradient,) = torch.autograd.grad(share.loss, logprobs)
    assert gradient[0, 0] == 0
    return share, gradient[0, 1].item()


def test_with_an_old_policy_of_its_own_the_ratio_is_against_that_and_rollouts_weigh():
    # r = π_θ/π_old = 1.1, π_old/π_rollout = 4 weighs 2. CISPO: −2·1.1·3·log π / 4.
    logs = {"logprob": -1.0, "old": -1.0 - np.log(1.1), "rollout": -1.0 - np.log(4.4)}
    share, gradient = one_token(**logs, tis_max=2.0)
    assert share.loss.item() == pytest.approx(2 * 1.1 * 3 / 4)
    assert gradient == pytest.approx(-2 * 1.1 * 3 / 4)
    share, gradient = one_token(**logs, kind="dapo", tis_max=2.0)
    assert share.loss.item() == pytest.approx(gradient) == pytest.approx(-2 * 1.1 * 3 / 4)
    share, gradient = one_token(**logs, kind="dapo", tis_max=2.0, eps_high=0.05)
    assert share.loss.item() == pytest.approx(-2 * 1.05 * 3 / 4)
    assert (gradient, share.clipped.tolist()) == (0, [True])


def test_against_the_rollouts_policy_no_truncated_weight_can_be_added():
    # r = π_θ/π_rollout = 4.4, whatever π_old was.
    share, gradient = one_token(logprob=-1.0, old=float("nan"), rollout=-1.0 - np.log(4.4))
    assert share.loss.item() == pytest.approx(4.4 * 3 / 4)
    assert gradient == pytest.approx(-4.4 * 3 / 4)


@pytest.mark.parametrize(
    ("ref", "k3", "pull"),
    # d = log 2, 0 and −log 2; d k3 / d log π_θ = 1 − e^d.
    [(-1 + np.log(2), 1 - np.log(2), -1), (-1.0, 0, 0), (-1 - np.log(2), np.log(2) - 0.5, 0.5)],
)
def test_the_reference_by_hand(ref, k3, pull):
    share, gradient = one_token(logprob=-1.0, old=-1.0, rollout=-1.0, ref=ref, kl_coefficient=0.1)
    assert share.ref_kl.tolist() == pytest.approx([k3])
    assert share.loss.item() == pytest.approx((3 + 0.1 * k3) / 4)
    assert gradient == pytest.approx((-3 + 0.1 * pull) / 4)


def test_k3_over_the_whole_distribution_is_the_divergence():
    policy, reference = doubles([0.5, 0.5]), doubles([0.9, 0.1])
    expected = (policy * k3_to_reference(policy.log(), reference.log())).sum()
    assert expected.item() == pytest.approx(0.510826, abs=1e-6)
    expected = (reference * k3_to_reference(reference.log(), policy.log())).sum()
    assert expected.item() == pytest.approx(0.368064, abs=1e-6)


@given(st.floats(-20, 0), st.floats(-20, 0))
def test_k3_is_never_negative_and_its_gradient_is_one_minus_the_ratio(logprob, ref_logprob):
    logprobs = doubles(logprob, requires_grad=True)
    ref_logprobs = doubles(ref_logprob, requires_grad=True)
    k3 = k3_to_reference(logprobs, ref_logprobs)
    k3.backward()
    assert k3 >= 0
    assert logprobs.grad.item() == pytest.approx(1 - np.exp(ref_logprob - logprob))
    assert ref_logprobs.grad is None


def test_k3_of_near_equals_is_exact_in_fp32():
    difference = torch.tensor([1e-3, -1e-3, 1e-2])
    k3 = k3_to_reference(torch.zeros(3), difference)
    exact = k3_to_reference(torch.zeros(3).double(), difference.double())
    torch.testing.assert_close(k3.double(), exact, rtol=1e-3, atol=0)


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "bounds"),
    [
        ("cispo", {"c_max": 5.0}),
        ("grpo", {"eps_low": 0.2, "eps_high": 0.2}),
        ("dr_grpo", {"eps_low": 0.2, "eps_high": 0.2}),
        ("dapo", {"eps_low": 0.2, "eps_high": 0.28}),
        ("gspo", {"eps_low": 3e-4, "eps_high": 4e-4}),
    ],
)
def test_a_kind_has_the_bounds_of_its_paper_and_they_survive_a_record(kind, bounds):
    chosen = LossSettings(kind=kind)
    assert chosen.bounds == bounds
    assert LossSettings.model_validate(chosen.model_dump(mode="json")) == chosen
    first = next(iter(bounds))
    assert LossSettings(kind=kind, **{first: 1.0}).bounds == bounds | {first: 1.0}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "grpo", "c_max": 4}, "grpo does not read c_max.*eps_low and eps_high"),
        ({"eps_low": 0.1}, "cispo does not read eps_low, remove it; it reads c_max"),
        ({"kind": "dapo", "eps_high": None}, "dapo needs eps_high"),
        ({"kind": "dapo", "eps_high": 0}, "greater than 0"),
        ({"c_max": 0.5}, "greater than or equal to 1"),
        ({"tis_max": 0.5}, "greater than or equal to 1"),
        ({"kind": "ppo"}, "'cispo', 'grpo', 'dr_grpo', 'dapo' or 'gspo'"),
    ],
)
def test_bounds_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        LossSettings(**wrong)
