"""The learner on DeepSpeed, against the same training written by hand in plain torch."""

import asyncio
import json
import math

import pytest
import torch
from engine_models import save_policy
from learner_hosts import TEMPERATURE, batch_of, poisoned_samples, published, random_samples
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.errors import DivergenceError, ModelError
from posttrain.workers.settings import LearnerSettings
from posttrain.workers.weights import with_lm_head

pytest_plugins = ["engine_fixtures", "learner_fixtures"]
pytestmark = pytest.mark.engine

SETTINGS = LearnerSettings(
    learning_rate=1e-3,
    warmup_steps=1,
    weight_decay=0.1,
    max_grad_norm=0.05,
    logprob_chunk_tokens=16,
)


class PlainTorch:
    """CISPO with AdamW and clipping, one unpacked sequence after the other."""

    def __init__(self, directory):
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=SETTINGS.betas, weight_decay=SETTINGS.weight_decay
        )

    def step(self, samples, learning_rate):
        """(loss, gradient norm before clipping)"""
        num_tokens = sum(sample.loss_mask.sum() for sample in samples)
        total = 0.0
        for sample in samples:
            ids = torch.from_numpy(sample.token_ids)[None]
            logits = self.model(input_ids=ids, use_cache=False).logits / TEMPERATURE
            logprobs = logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            ratio = (logprobs.detach() - torch.from_numpy(sample.rollout_logprobs[1:])).exp()
            weight = ratio.clamp(max=5.0) * torch.from_numpy(sample.advantages[1:])
            loss = -(weight * logprobs)[torch.from_numpy(sample.loss_mask[1:]) > 0].sum()
            loss = loss / num_tokens
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), SETTINGS.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, float(norm)

    def score(self, ids):
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([ids])).logits[0, :-1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[1:, None])[:, 0].tolist()

    def state(self):
        state = {k: v.detach() for k, v in self.model.state_dict().items() if k != "lm_head.weight"}
        return with_lm_head(state, tied=True)


class Pair:
    """A learner and its reference, which have seen the same batches; tests run in any order."""

    def __init__(self, learner, reference, directory):
        self.learner = learner
        self.reference = reference
        self._directory = directory
        self._written = 0
        self._steps = 0

    def step(self, samples, *, micro_tokens, share_prompts=False):
        warmed_up = (self._steps + 1) / (SETTINGS.warmup_steps + 1)
        self._steps += 1
        batch = batch_of(samples, micro_tokens=micro_tokens, share_prompts=share_prompts)
        metrics = asyncio.run(self.learner.step(batch))
        assert metrics["learning_rate"] == SETTINGS.learning_rate * min(1.0, warmed_up)
        return metrics

    def weights(self):
        """What the learner would publish."""
        self._written += 1
        return published(self.learner, self._directory / str(self._written))

    def assert_equal_weights(self, tolerance):
        weights, expected = self.weights(), self.reference.state()
        assert weights.keys() == expected.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(
                tensor,
                expected[name],
                rtol=0,
                atol=tolerance,
                msg=lambda m, name=name: f"{name}: {m}",
            )


@pytest.fixture(scope="module")
def pair(one_rank, tmp_path_factory):
    directory = tmp_path_factory.mktemp("learner")
    policy = save_policy(directory / "policy", tied=True)
    return Pair(one_rank.begin(policy, SETTINGS), PlainTorch(policy), directory)


def test_a_step_equals_plain_torch_however_the_batch_is_split(pair):
    assert asyncio.run(pair.learner.can_share_prompts())
    for seed, micro_tokens, share_prompts in (
        (1, 8, False),
        (2, 4096, False),
        (3, 128, True),
    ):
        samples = random_samples(seed)
        metrics = pair.step(samples, micro_tokens=micro_tokens, share_prompts=share_prompts)
        loss, norm = pair.reference.step(samples, metrics["learning_rate"])
        assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert norm > 2 * SETTINGS.max_grad_norm  # else nothing would have been clipped
        assert 0 < metrics["clipped_fraction"] < 1
        assert metrics["skipped_steps"] == 0
        pair.assert_equal_weights(1e-5)


def test_a_batch_with_nan_is_skipped_counted_and_leaves_no_trace(pair):
    before = pair.weights()
    metrics = pair.step(poisoned_samples(), micro_tokens=128)
    assert math.isnan(metrics["loss"])
    assert not math.isfinite(metrics["grad_norm"])
    assert metrics["skipped_steps"] == 1
    after = pair.weights()
    assert all(torch.equal(before[name], after[name]) for name in before)

    samples = random_samples(4)
    metrics = pair.step(samples, micro_tokens=128)
    assert metrics["skipped_steps"] == 0
    pair.reference.step(samples, metrics["learning_rate"])
    pair.assert_equal_weights(1e-5)


def test_the_third_skipped_step_in_a_row_is_divergence(pair):
    before = pair.weights()
    for count in (1, 2):
        assert pair.step(poisoned_samples(), micro_tokens=4096)["skipped_steps"] == count
    with pytest.raises(DivergenceError, match=r"3 steps in a row.*learning_rate"):
        pair.step(poisoned_samples(), micro_tokens=4096)
    after = pair.weights()
    assert all(torch.equal(before[name], after[name]) for name in before)

    samples = random_samples(5)
    metrics = pair.step(samples, micro_tokens=4096)
    pair.reference.step(samples, metrics["learning_rate"])
    pair.assert_equal_weights(1e-5)


def test_tokens_are_scored_like_transformers_does(pair):
    sequences = [[3, 40, 77, 5, 120], [9, 8], list(range(3, 128))]
    scored = asyncio.run(pair.learner.score_tokens(sequences))
    for ids, logprobs in zip(sequences, scored, strict=True):
        assert logprobs == pytest.approx(pair.reference.score(ids), abs=1e-4)


def test_the_saved_policy_loads_in_transformers_with_equal_weights(pair, tmp_path):
    source = pair._directory / "policy"
    asyncio.run(pair.learner.save_policy(tmp_path / "saved", str(source)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert model.dtype is torch.float32
    weights = pair.weights()
    state = model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    text = "the quick brown fox"
    tokenizers = [AutoTokenizer.from_pretrained(d) for d in (tmp_path / "saved", source)]
    assert len({tuple(t(text)["input_ids"]) for t in tokenizers}) == 1
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"]


def test_an_architecture_whose_packed_sequences_see_each_other_is_refused(one_rank, tmp_path):
    from transformers import FalconConfig, FalconForCausalLM

    policy = save_policy(tmp_path / "policy", tied=True)
    config = FalconConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    FalconForCausalLM(config).save_pretrained(policy)
    with pytest.raises(ModelError, match=r"see each other.*cannot train it"):
        one_rank.begin(policy, SETTINGS)
