"""Policy losses, their aggregation and diagnostics, and log-probabilities of packed batches."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.losses.aggregate import fixed_length_mean, global_token_mean, sequence_mean
from posttrain.losses.diagnostics import diagnostic_sums, summarise
from posttrain.losses.logprobs import token_logprobs
from posttrain.losses.policy import LOSSES, cispo, grpo
from posttrain.packing import pack
from posttrain.types import PolicyVersion, TrainingSample


def doubles(values, requires_grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=requires_grad)


# --- log-probabilities -------------------------------------------------------------------------


def logprob_inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 11, 6, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(17, 6, generator=generator, dtype=torch.float64).to(dtype)
    token_ids = torch.randint(17, (3, 11), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), token_ids


@pytest.mark.parametrize("chunk_tokens", [1, 7, 10, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_entropy_and_gradients_match_the_full_softmax(chunk_tokens, temperature):
    hidden, weight, token_ids = logprob_inputs()
    logprobs, entropy = token_logprobs(hidden, weight, token_ids, temperature, chunk_tokens)
    full = torch.log_softmax(hidden[:, :-1] @ weight.T / temperature, dim=-1)
    expected = full.gather(-1, token_ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(logprobs[:, 1:], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(entropy[:, 1:], -(full.exp() * full).sum(-1), atol=1e-6, rtol=0)
    assert logprobs[:, 0].tolist() == entropy[:, 0].tolist() == [0, 0, 0]
    assert not entropy.requires_grad

    upstream = torch.randn(logprobs.shape, dtype=torch.float64)
    ours = torch.autograd.grad((logprobs * upstream).sum(), [hidden, weight])
    reference = torch.autograd.grad((expected * upstream[:, 1:]).sum(), [hidden, weight])
    for mine, theirs in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)


def test_bf16_models_get_fp32_logits():
    hidden, weight, token_ids = logprob_inputs(torch.bfloat16)
    logprobs, _ = token_logprobs(hidden, weight, token_ids, 1.0, 4)
    full = torch.log_softmax(hidden[:, :-1].float() @ weight.float().T, dim=-1)
    assert logprobs.dtype is torch.float32
    torch.testing.assert_close(logprobs[:, 1:], full.gather(-1, token_ids[:, 1:, None])[..., 0])
    logprobs.sum().backward()
    assert weight.grad.dtype is torch.bfloat16


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_logits_never_exist_for_more_than_a_chunk():
    tokens, vocabulary, chunk = 64, 50, 4
    hidden = torch.randn(1, tokens + 1, 2, requires_grad=True)
    weight = torch.randn(vocabulary, 2, requires_grad=True)
    token_ids = torch.randint(vocabulary, (1, tokens + 1))
    saved = []
    with (
        LargestTensor() as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        logprobs, _ = token_logprobs(hidden, weight, token_ids, 1.0, chunk)
        # Kept for the backward pass: the inputs, nothing of the size of a chunk's logits.
        assert all(t.numel() < chunk * vocabulary for t in saved)
        logprobs.sum().backward()
    assert largest.numel == chunk * vocabulary


# --- losses ------------------------------------------------------------------------------------


def test_dapo_clipping_by_hand():
    ratio = doubles([1.5, 0.5, 1.5, 0.5])
    advantages = doubles([1.0, 1.0, -1.0, -1.0])
    losses, clipped = grpo(ratio.log(), torch.zeros(4), advantages, eps_low=0.2, eps_high=0.28)
    np.testing.assert_allclose(losses, [-1.28, -0.5, 1.5, 0.8], rtol=1e-12)
    assert clipped.tolist() == [True, False, False, True]


def test_grpo_gradient():
    torch.manual_seed(0)
    rollout_logprobs = -torch.rand(40, dtype=torch.float64)
    log_ratio = torch.randn(40, dtype=torch.float64) * 0.5
    advantages = torch.randn(40, dtype=torch.float64)
    logprobs = (rollout_logprobs + log_ratio).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: grpo(x, rollout_logprobs, advantages)[0], [logprobs])
    losses, clipped = grpo(logprobs, rollout_logprobs, advantages)
    losses.sum().backward()
    expected = torch.where(clipped, 0.0, -log_ratio.exp() * advantages)
    torch.testing.assert_close(logprobs.grad, expected)
    assert 0 < clipped.sum() < 40


def test_cispo_by_hand():
    # r = 1, 2, 8 (clipped to 5), .5 with log π = −1, −.5, −2, −1
    logprobs = doubles([-1.0, -0.5, -2.0, -1.0], requires_grad=True)
    rollout_logprobs = logprobs.detach() - doubles([1.0, 2.0, 8.0, 0.5]).log()
    losses, clipped = cispo(logprobs, rollout_logprobs, doubles([1.0, 1.0, 1.0, -2.0]))
    np.testing.assert_allclose(losses.detach(), [1.0, 1.0, 10.0, -1.0], rtol=1e-12)
    assert clipped.tolist() == [False, False, True, False]
    losses.sum().backward()
    np.testing.assert_allclose(logprobs.grad, [-1.0, -2.0, -5.0, 1.0], rtol=1e-12)


def test_cispo_gradient_is_that_of_a_fixed_weight():
    torch.manual_seed(0)
    logprobs = -torch.rand(20, dtype=torch.float64)
    rollout_logprobs = logprobs - torch.randn(20, dtype=torch.float64) * 2
    advantages = torch.randn(20, dtype=torch.float64)
    weight = (logprobs - rollout_logprobs).exp().clamp(max=3.0)
    leaf = logprobs.clone().requires_grad_()
    cispo(leaf, rollout_logprobs, advantages, c_max=3.0).losses.sum().backward()
    step = 1e-6
    difference = (-weight * advantages * (logprobs + step)) - (
        -weight * advantages * (logprobs - step)
    )
    torch.testing.assert_close(leaf.grad, difference / (2 * step), atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_on_policy_every_loss_has_the_policy_gradient(name):
    logprobs = doubles([-0.3, -1.2, -2.0], requires_grad=True)
    advantages = doubles([0.75, -0.25, 2.0])
    losses, clipped = LOSSES[name](logprobs, logprobs.detach(), advantages)
    losses.sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages)
    assert not clipped.any()


# --- aggregation -------------------------------------------------------------------------------


def golden_losses():
    """Token losses [1, 1] and [−.5 × 6], each after a prompt token, and a padding token."""
    losses = doubles([[9.0, 1.0, 1.0, 9.0, *[-0.5] * 6, 9.0]])
    mask = torch.tensor([[0.0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0]])
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 0]])
    return losses, mask, position_ids


def test_aggregates_by_hand():
    losses, mask, position_ids = golden_losses()
    assert sequence_mean(losses, mask, position_ids, 2).item() == pytest.approx(0.25)
    assert global_token_mean(losses, mask, 8).item() == pytest.approx(-0.125)
    assert fixed_length_mean(losses, mask, 2, 10).item() == pytest.approx(-0.05)


def test_masking_a_token_does_not_make_the_others_heavier():
    losses, mask, _ = golden_losses()
    mask[0, 1] = 0
    assert global_token_mean(losses, mask, 8).item() == pytest.approx(-0.25)


# --- diagnostics -------------------------------------------------------------------------------


def sums_of(ratio, clipped, mask, ages, max_age=2):
    ratio = doubles([ratio])
    return diagnostic_sums(
        ratio.log() - 1.0,
        torch.full_like(ratio, -1.0),
        torch.tensor([clipped]),
        torch.full_like(ratio, 0.25),
        torch.tensor([mask]),
        torch.tensor([ages]),
        max_age,
    )


def test_diagnostics_by_hand():
    # The third token is not trained; the last one is older than the last bin.
    sums = sums_of([1.0, 2.0, 9.0, 0.5], [0, 1, 1, 0], [1.0, 1.0, 0.0, 1.0], [0, 1, 1, 5])
    assert sums["tokens"].tolist() == [1, 1, 1]
    assert sums["clipped"].tolist() == [0, 1, 0]
    metrics = summarise(sums)
    assert metrics["ess"] == pytest.approx(3.5**2 / (3 * 5.25))
    k3 = [0.0, 1 - np.log(2), -0.5 + np.log(2)]
    assert metrics["k3"] == pytest.approx(np.mean(k3))
    assert metrics["k3_age_0"] == 0
    assert metrics["k3_age_2"] == pytest.approx(k3[2])
    assert metrics["clipped_fraction"] == pytest.approx(1 / 3)
    assert metrics["clipped_fraction_age_1"] == 1
    assert metrics["entropy"] == pytest.approx(0.25)


def test_diagnostics_add_up_over_micro_batches():
    ratio, clipped, mask, ages = [1.0, 2.0, 0.5, 3.0], [0, 1, 0, 1], [1.0] * 4, [0, 0, 2, 2]
    whole = sums_of(ratio, clipped, mask, ages)
    halves = [
        sums_of(ratio[part], clipped[part], mask[part], ages[part])
        for part in (slice(0, 1), slice(1, 4))
    ]
    added = {name: halves[0][name] + halves[1][name] for name in whole}
    assert summarise(added) == pytest.approx(summarise(whole))
    assert "k3_age_1" not in summarise(whole)


# --- packed forward against separate forwards --------------------------------------------------


@pytest.fixture(scope="module")
def model():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        dtype=torch.float32,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    made = []
    for index, length in enumerate([5, 31, 12, 7, 20, 9, 16, 3]):
        mask = (np.arange(length) >= 2).astype(np.float32)
        made.append(
            TrainingSample(
                token_ids=rng.integers(1, 40, length),
                loss_mask=mask,
                rollout_logprobs=mask * rng.uniform(-6, -2, length).astype(np.float32),
                advantages=mask * np.float32(index % 3 - 0.7),
                oldest_version=PolicyVersion(1, 0),
            )
        )
    return made


def packed(samples, row_tokens, micro_tokens):
    return pack(
        samples,
        row_tokens=row_tokens,
        micro_tokens=micro_tokens,
        pad_token_id=0,
        current=PolicyVersion(1, 1),
    )


def logprobs_of(model, token_ids, position_ids):
    hidden = model.model(
        input_ids=token_ids, position_ids=position_ids, use_cache=False
    ).last_hidden_state
    return token_logprobs(hidden, model.lm_head.weight, token_ids, 0.8, chunk_tokens=16)[0]


@torch.no_grad()
def test_packed_logprobs_equal_separate_ones(model, samples):
    (micro,) = packed(samples, row_tokens=40, micro_tokens=400).micro_batches
    token_ids, position_ids = (torch.from_numpy(a) for a in (micro.token_ids, micro.position_ids))
    assert token_ids.shape[0] > 1
    assert ((position_ids == 0).sum(dim=1) > 1).any()
    logprobs = logprobs_of(model, token_ids, position_ids)
    by_ids = {}
    for r, row in enumerate(position_ids):
        starts = [*torch.nonzero(row == 0).flatten().tolist(), len(row)]
        for start, end in itertools.pairwise(starts):
            by_ids[tuple(token_ids[r, start:end].tolist())] = logprobs[r, start:end]
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids)[None]
        alone = logprobs_of(model, ids, torch.arange(ids.shape[1])[None])[0]
        together = by_ids[tuple(sample.token_ids.tolist())]
        torch.testing.assert_close(together[1:], alone[1:], atol=1e-5, rtol=0)


def loss_and_gradients(model, batch, loss_name, aggregate):
    model.zero_grad()
    total = 0.0
    for micro in batch.micro_batches:
        token_ids, position_ids, mask, rollout_logprobs, advantages = (
            torch.from_numpy(a)
            for a in (
                micro.token_ids,
                micro.position_ids,
                micro.loss_mask,
                micro.rollout_logprobs,
                micro.advantages,
            )
        )
        logprobs = logprobs_of(model, token_ids, position_ids)
        losses = LOSSES[loss_name](logprobs, rollout_logprobs, advantages).losses
        loss = (
            sequence_mean(losses, mask, position_ids, batch.num_sequences)
            if aggregate == "sequence"
            else global_token_mean(losses, mask, batch.num_loss_tokens)
        )
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("loss_name", "aggregate"), [("cispo", "token"), ("grpo", "sequence"), ("cispo", "sequence")]
)
def test_the_split_changes_neither_loss_nor_gradient(model, samples, loss_name, aggregate):
    # One sequence a micro-batch is the reference.
    alone = packed(samples, row_tokens=1, micro_tokens=1)
    assert len(alone.micro_batches) == len(samples)
    loss, gradients = loss_and_gradients(model, alone, loss_name, aggregate)
    assert max(g.abs().max() for g in gradients.values()) > 0.01
    for row_tokens, micro_tokens in [(40, 400), (40, 80), (128, 128), (16, 64)]:
        batch = packed(samples, row_tokens, micro_tokens)
        other_loss, other = loss_and_gradients(model, batch, loss_name, aggregate)
        assert other_loss == pytest.approx(loss, abs=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(other[name], gradient, atol=1e-5, rtol=1e-5)
