"""Log-probabilities: those of the full softmax, without all logits at once."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.losses.logprobs import token_logprobs


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


class LiveLogits(TorchDispatchMode):
    """The most numbers of tensors `[*, vocabulary]` that lived at once, and the largest tensor."""

    def __init__(self, vocabulary, known):
        super().__init__()
        self.peak = self.largest = 0
        self._vocabulary = vocabulary
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._living = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        self._living = {k: v for k, v in self._living.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(numel for _, numel in self._living.values()))
        return out

    def _see(self, tensor):
        self.largest = max(self.largest, tensor.numel())
        storage = tensor.untyped_storage()
        of_logits = tensor.dim() == 2 and tensor.shape[1] == self._vocabulary
        if of_logits and storage.data_ptr() not in self._known:
            self._living[storage._cdata] = (StorageWeakRef(storage), tensor.numel())


def live_logits(tokens, vocabulary, chunk):
    """Forward and backward over `tokens` tokens in chunks."""
    hidden = torch.randn(1, tokens + 1, 2, requires_grad=True)
    weight = torch.randn(vocabulary, 2, requires_grad=True)
    token_ids = torch.randint(vocabulary, (1, tokens + 1))
    saved = []
    with (
        LiveLogits(vocabulary, [weight]) as live,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        logprobs, _ = token_logprobs(hidden, weight, token_ids, 1.0, chunk)
        # Kept for the backward pass: the inputs, nothing of the size of a chunk's logits.
        assert all(t.numel() < chunk * vocabulary for t in saved)
        logprobs.sum().backward()
    assert weight.grad is not None
    return live


def test_logits_never_exist_for_more_than_a_chunk():
    vocabulary, chunk = 500, 4
    short = live_logits(2 * chunk, vocabulary, chunk)
    long = live_logits(64 * chunk, vocabulary, chunk)
    assert short.largest == long.largest == chunk * vocabulary
    # Five such tensors of one chunk and none of another; the rest is the weight's gradient.
    assert short.peak == long.peak < 6 * chunk * vocabulary


def test_the_count_of_live_logits_sees_those_of_a_full_softmax():
    with LiveLogits(50, []) as live:
        logits = torch.randn(8, 50, requires_grad=True).clone()
        torch.log_softmax(logits, dim=-1).sum().backward()
    assert live.peak >= 3 * 8 * 50
