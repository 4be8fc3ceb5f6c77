"""Hard and soft targets mixed: by hand, against finite differences, unbiased, and split anyhow."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from posttrain.losses.distillation import (
    TeacherTargets,
    distillation_losses,
    mixed_loss,
    responsibility,
    teacher_advantages,
)
from posttrain.losses.distillation_settings import DistillationSettings
from posttrain.losses.teacher_weight import PRIOR_BOUND, Lead, Reliability, dynamic_weight

V, N = 7, 5


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def whole(q, labels, temperature=1.0):
    """Targets with every id and an empty tail; `q` `[N, V]` at τ = 1."""
    soft = (q.log() / temperature).softmax(-1)
    rows = torch.arange(q.shape[1]).expand(len(q), -1)
    entropy = -torch.xlogy(soft, soft).sum(-1)
    label_logprobs = q.log().gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return TeacherTargets(rows, soft, torch.zeros_like(entropy), entropy, label_logprobs)


def top(q, labels, k):
    kept, ids = q.topk(k, dim=-1)
    full = whole(q, labels)
    tail = 1 - kept.sum(-1) if k < q.shape[-1] else full.tail
    return full._replace(ids=ids, weights=kept, tail=tail)


def sampled(q, labels, draws, generator):
    """As a teacher stores them: counts of `draws` ids from q."""
    ids = torch.multinomial(q, draws, replacement=True, generator=generator)
    full = whole(q, labels)
    return full._replace(
        ids=ids, weights=torch.full_like(ids, 1.0, dtype=q.dtype) / draws, tail=None
    )


def losses_of(logits, labels, targets, temperature=1.0, divergence="forward_kl", chunk_tokens=3):
    return distillation_losses(
        logits,
        labels,
        targets,
        temperature=temperature,
        divergence=divergence,
        chunk_tokens=chunk_tokens,
    )


@pytest.fixture
def example():
    """Student logits `[N, V]`, labels `[N]`, teacher's q `[N, V]`."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N, V, generator=generator, dtype=torch.float64)
    q = torch.randn(N, V, generator=generator, dtype=torch.float64).softmax(-1)
    return logits, torch.randint(V, (N,), generator=generator), q


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("divergence", "value"), [("forward_kl", 0.510826), ("reverse_kl", 0.368064)]
)
def test_divergences_of_two_ids_by_hand(divergence, value):
    logits, label, q = doubles([[0.9, 0.1]]).log(), torch.tensor([0]), doubles([[0.5, 0.5]])
    losses = losses_of(logits, label, whole(q, label), divergence=divergence)
    assert losses.divergence.item() == pytest.approx(value, abs=1e-6)
    assert losses.ce.item() == pytest.approx(-math.log(0.9))


def test_a_tail_counts_as_one_more_id():
    logits, label = doubles([[0.6, 0.3, 0.1]]).log(), torch.tensor([0])
    targets = top(doubles([[0.5, 0.3, 0.2]]), label, 1)
    forward = 0.5 * math.log(0.5 / 0.6) + 0.5 * math.log(0.5 / 0.4)
    reverse = 0.6 * math.log(0.6 / 0.5) + 0.4 * math.log(0.4 / 0.5)
    assert losses_of(logits, label, targets).divergence.item() == pytest.approx(forward)
    assert losses_of(logits, label, targets, divergence="reverse_kl").divergence.item() == (
        pytest.approx(reverse)
    )


def test_without_the_teacher_it_is_cross_entropy(example):
    logits, labels, q = example
    losses = losses_of(logits, labels, whole(q, labels))
    ours = mixed_loss(losses, torch.zeros(N), temperature=1.0, num_loss_tokens=N)
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(logits, labels))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_the_teacher_alone_it_is_the_divergence(example, temperature):
    logits, labels, q = example
    losses = losses_of(logits, labels, whole(q, labels, temperature), temperature)
    ours = mixed_loss(losses, torch.ones(N), temperature=temperature, num_loss_tokens=N)
    student = (logits / temperature).log_softmax(-1)
    teacher = (q.log() / temperature).log_softmax(-1)
    expected = torch.nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
    torch.testing.assert_close(ours, temperature**2 * expected)


# --- gradients ----------------------------------------------------------------------------------


def test_the_logit_gradient_is_the_student_minus_the_mixture(example):
    logits, labels, q = example
    logits.requires_grad_()
    alpha = torch.linspace(0, 1, N, dtype=torch.float64)
    losses = losses_of(logits, labels, whole(q, labels))
    mixed_loss(losses, alpha, temperature=1.0, num_loss_tokens=1).backward()
    hard = torch.nn.functional.one_hot(labels, V)
    mixture = (1 - alpha)[:, None] * hard + alpha[:, None] * q
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - mixture)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("k", [2, V])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_the_gradient_is_that_of_finite_differences(example, divergence, k, temperature):
    logits, labels, q = example
    soft = (q.log() / temperature).softmax(-1)
    alpha = torch.linspace(0.2, 0.9, N, dtype=torch.float64)

    def loss(values):
        losses = losses_of(values, labels, top(soft, labels, k), temperature, divergence)
        return mixed_loss(losses, alpha, temperature=temperature, num_loss_tokens=N)

    assert torch.autograd.gradcheck(loss, logits.requires_grad_(), atol=1e-7)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_a_teacher_like_the_student_pulls_nowhere(example, divergence):
    logits, labels, _ = example
    targets = top(logits.softmax(-1), labels, 3)
    losses = losses_of(logits.requires_grad_(), labels, targets, divergence=divergence)
    torch.testing.assert_close(losses.divergence, torch.zeros(N, dtype=torch.float64))
    losses.divergence.sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits))


def test_what_the_teacher_cannot_say_keeps_reverse_kl_finite():
    logits, label = torch.zeros(1, 3), torch.tensor([0])
    targets = top(torch.tensor([[1.0, 0.0, 0.0]]), label, 2)
    losses = losses_of(logits.requires_grad_(), label, targets, divergence="reverse_kl")
    losses.divergence.sum().backward()
    assert 50 < losses.divergence.item() < 100
    assert logits.grad.isfinite().all()


# --- sampled targets ----------------------------------------------------------------------------


def test_sampled_targets_are_unbiased_and_truncated_ones_are_not(example):
    """Mean soft gradient over 4000 draws of 20 ids, within four standard errors of p − q."""
    logits, labels, q = example
    generator = torch.Generator().manual_seed(1)
    p = logits.softmax(-1)
    gradients, values = [], []
    for _ in range(4000):
        targets = sampled(q, labels, 20, generator)
        gradients.append(p - torch.zeros_like(p).scatter_add(-1, targets.ids, targets.weights))
        values.append(losses_of(logits, labels, targets, chunk_tokens=N).divergence)
    drawn = torch.stack(gradients)
    error = drawn.std(0) / math.sqrt(len(drawn))
    assert ((drawn.mean(0) - (p - q)).abs() <= 4 * error + 1e-12).all()
    value = torch.stack(values)
    exact = losses_of(logits, labels, whole(q, labels)).divergence
    assert ((value.mean(0) - exact).abs() <= 4 * value.std(0) / math.sqrt(len(value))).all()

    kept = top(q, labels, 3)
    renormalised = kept.weights / kept.weights.sum(-1, keepdim=True)
    cut = p - torch.zeros_like(p).scatter_add(-1, kept.ids, renormalised)
    assert ((cut - (p - q)).abs() > 8 * error).any(-1).all()


def test_the_functions_gradient_is_the_one_that_was_averaged(example):
    logits, labels, q = example
    targets = sampled(q, labels, 20, torch.Generator().manual_seed(2))
    losses_of(logits.requires_grad_(), labels, targets).divergence.sum().backward()
    drawn = torch.zeros_like(q).scatter_add(-1, targets.ids, targets.weights)
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - drawn)


# --- split ---------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    cuts=st.lists(st.integers(0, 12), max_size=3).map(sorted),
    order=st.permutations(range(12)),
    chunk_tokens=st.integers(1, 13),
)
def test_order_and_split_change_neither_loss_nor_gradient(cuts, order, chunk_tokens):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(12, V, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (12,), generator=generator)
    q = torch.randn(12, V, generator=generator, dtype=torch.float64).softmax(-1)
    alpha = torch.rand(12, generator=generator, dtype=torch.float64)
    targets = top(q, labels, 3)

    def share(values, here, chunk):
        part = TeacherTargets(*(field[here] for field in targets))
        losses = losses_of(values[here], labels[here], part, chunk_tokens=chunk)
        return mixed_loss(losses, alpha[here], temperature=1.0, num_loss_tokens=12)

    together = logits.clone().requires_grad_()
    loss = share(together, torch.arange(12), 12)
    loss.backward()
    apart = logits.clone().requires_grad_()
    edges = [0, *cuts, 12]
    parts = [
        share(apart, torch.tensor(order[a:b], dtype=torch.int64), chunk_tokens)
        for a, b in itertools.pairwise(edges)
        if a < b
    ]
    total = torch.stack(parts).sum()
    total.backward()
    torch.testing.assert_close(total, loss)
    torch.testing.assert_close(apart.grad, together.grad)


def test_a_micro_batch_without_a_loss_token_adds_nothing():
    logits = torch.zeros(0, V, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64)
    targets = whole(torch.zeros(0, V), labels)
    loss = mixed_loss(
        losses_of(logits, labels, targets), torch.zeros(0), temperature=1.0, num_loss_tokens=9
    )
    assert loss.item() == 0
    loss.backward()


# --- the weight -----------------------------------------------------------------------------------


def test_responsibility_by_hand():
    labels = doubles([0.8, 0.1, 0.5]).log(), doubles([0.2, 0.5, 0.5]).log()
    prior = doubles([0.9, 0.9, 0.25])
    expected = [0.72 / (0.72 + 0.02), 0.09 / (0.09 + 0.05), 0.25]
    torch.testing.assert_close(responsibility(*labels, prior, 0.0), doubles(expected))
    in_doubt = [0.72 / (0.72 + 0.002), 0.09 / (0.09 + 0.005), 0.25 / (0.25 + 0.075)]
    torch.testing.assert_close(responsibility(*labels, prior, math.log(10)), doubles(in_doubt))


def test_responsibility_survives_what_a_teacher_rules_out():
    weight = responsibility(
        torch.tensor([-200.0, 0.0]), torch.tensor([-1.0, -200.0]), torch.tensor([0.9, 0.9]), 4.6
    )
    assert weight[0].item() < 1e-30
    assert weight[1].item() == 1


@pytest.mark.parametrize("corrupted", [0.1, 0.2, 0.4])
def test_planted_corruption_is_recovered(corrupted):
    """A share of the labels has nothing to do with what the teacher says; π finds the share, and
    the responsibility the labels."""
    generator = torch.Generator().manual_seed(4)
    size, tokens = 20, 2000
    reliability = Reliability(prior=0.9, memory=0.8)
    critic = torch.full((tokens,), 1 / size).log()
    for _ in range(40):
        q = (4 * torch.randn(tokens, size, generator=generator)).softmax(-1)
        labels = torch.multinomial(q, 1, generator=generator).squeeze(-1)
        wrong = torch.rand(tokens, generator=generator) < corrupted
        labels[wrong] = torch.randint(size, (int(wrong.sum()),), generator=generator)
        known = q.log().gather(-1, labels[:, None]).squeeze(-1)
        prior = torch.full((tokens,), reliability.prior("maths"))
        weight = responsibility(known, critic, prior, 0.0)
        reliability.observe("maths", weight.mean().item())
    assert reliability.prior("maths") == pytest.approx(1 - corrupted, abs=0.03)
    assert weight[~wrong].mean() > 0.85
    assert weight[wrong].mean() < 0.4


@pytest.mark.parametrize("corrupted", [0.1, 0.2, 0.4])
def test_a_teacher_hardly_ahead_of_the_critic_keeps_its_word_where_it_is_right(corrupted):
    """The critic explains right labels almost as well. Who explains labels better on the whole is
    then the critic, as soon as the teacher is wrong in some; the margin asks where it is wrong."""
    generator = torch.Generator().manual_seed(4)
    size, tokens = 20, 2000
    priors = {margin: Reliability(prior=0.9, memory=0.8) for margin in (0.0, 2.3)}
    weights = {}
    for _ in range(40):
        logits = 8 * torch.randn(tokens, size, generator=generator)
        q, p0 = logits.softmax(-1), (0.8 * logits).softmax(-1)
        labels = torch.multinomial(q, 1, generator=generator)
        wrong = torch.rand(tokens, generator=generator) < corrupted
        q[wrong] = q[wrong].roll(1, dims=-1)
        known, critic = (p.log().gather(-1, labels).squeeze(-1) for p in (q, p0))
        for margin, reliability in priors.items():
            prior = torch.full((tokens,), reliability.prior("maths"))
            weights[margin] = responsibility(known, critic, prior, margin)
            reliability.observe("maths", weights[margin].mean().item())
    assert weights[2.3][~wrong].mean() > 0.92
    assert weights[2.3][wrong].mean() < 0.1
    assert weights[0.0][~wrong].mean() < 0.5


def test_reliability_keeps_domains_apart():
    reliability = Reliability(prior=0.9, memory=0.5)
    reliability.observe("maths", 0.1)
    assert reliability.prior("maths") == pytest.approx(0.5)
    assert reliability.prior("code") == 0.9
    for _ in range(100):
        reliability.observe("maths", 0.0)
        reliability.observe("code", 1.0)
    assert reliability.by_domain == {"maths": PRIOR_BOUND, "code": 1 - PRIOR_BOUND}


def test_lead_by_hand():
    lead = Lead(slope=5.0, offset=0.0, min_lead=0.1, memory=0.5)
    assert (lead.weight, lead.gap) == (1.0, None)
    lead.observe(student_ce=1.2, teacher_ce=1.0)
    assert lead.gap == pytest.approx(0.2)
    assert lead.weight == pytest.approx(1 / (1 + math.exp(-1.0)))
    lead.observe(student_ce=0.8, teacher_ce=1.0)
    assert lead.gap == pytest.approx(0.0)
    assert lead.weight == pytest.approx(0.5)
    for _ in range(50):
        lead.observe(student_ce=0.0, teacher_ce=2.0)
    assert lead.weight == 0.1
    for _ in range(50):
        lead.observe(student_ce=400.0, teacher_ce=0.0)
    assert lead.weight == 1.0


def test_the_weights_start_as_their_settings_say():
    lead, reliability = dynamic_weight(DistillationSettings())
    lead.observe(1.0, 1.2)
    assert lead.weight == pytest.approx(0.5)
    lead.observe(10.0, 1.0)
    assert lead.weight > 0.98
    assert reliability.prior("any") == 0.9


@pytest.mark.parametrize(
    ("settings_given", "said"),
    [
        ({"weight": "constant", "slope": 2.0}, "constant does not read slope"),
        ({"weight": "ce_only", "alpha": 0.5}, "ce_only does not read alpha"),
        ({"alpha": 0.5}, "dynamic does not read alpha"),
        ({"weight": "dynamic", "prior": None}, "dynamic needs prior"),
    ],
)
def test_settings_that_nobody_would_read_are_refused(settings_given, said):
    with pytest.raises(ValidationError, match=said):
        DistillationSettings(**settings_given)


# --- online ---------------------------------------------------------------------------------------


def test_the_teachers_word_joins_the_advantage():
    logprobs = doubles([[-1.0, -2.0, -3.0]]).requires_grad_()
    joined = teacher_advantages(
        doubles([[0.5, 0.5, 0.0]]), doubles([[-0.5, -4.0, math.nan]]), logprobs, 0.1
    )
    torch.testing.assert_close(joined, doubles([[0.55, 0.3, 0.0]]))
    assert not joined.requires_grad


def test_its_expected_gradient_is_that_of_the_reverse_divergence():
    """Over all actions of one token, weighed by π_rollout and the ratio: −∇ KL(π_θ ‖ q)."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(V, generator=generator, dtype=torch.float64, requires_grad=True)
    q = torch.randn(V, generator=generator, dtype=torch.float64).log_softmax(-1)
    rollout = torch.randn(V, generator=generator, dtype=torch.float64).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    advantages = teacher_advantages(torch.zeros(V, dtype=torch.float64), q, logprobs, 1.0)
    ratio = (logprobs - rollout).exp().detach()
    (rollout.exp() * -ratio * advantages * logprobs).sum().backward()
    ours, logits.grad = logits.grad, None
    logprobs = logits.log_softmax(-1)
    (logprobs.exp() * (logprobs - q)).sum().backward()
    # The score function's mean is 0, so the two differ by rounding alone.
    torch.testing.assert_close(ours, logits.grad)
