"""The learner on two ranks: the same curve as on one, and one end for all when a rank fails."""

import asyncio
import math
import os
import time
from functools import partial

import pytest
import ray
import torch
from engine_models import save_moe_policy, save_policy
from learner_hosts import (
    batch_of,
    largest_difference,
    poisoned_samples,
    published,
    random_samples,
    train,
)
from transformers import AutoModelForCausalLM

from posttrain.errors import (
    DivergenceError,
    EngineError,
    SettingsError,
    StageError,
)
from posttrain.losses.settings import LossSettings
from posttrain.workers import learner_actor, learner_ranks
from posttrain.workers.cluster import create_actor
from posttrain.workers.learner_ranks import RemoteLearner, start_learner
from posttrain.workers.settings import (
    ActorResources,
    LearnerResources,
    LearnerSettings,
    LoraSettings,
)
from posttrain.workers.weights import read_checkpoint, write_weights

pytest_plugins = ["engine_fixtures", "learner_fixtures"]
pytestmark = pytest.mark.engine

NUM_STEPS = 20
# Tiny tensors would otherwise stay whole on every rank, and nothing would be shown.
DIVIDE_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
BASE = LearnerSettings(
    learning_rate=1e-3,
    weight_decay=0.1,
    warmup_steps=2,
    schedule="cosine",
    max_grad_norm=0.05,
    logprob_chunk_tokens=16,
    zero_stage=2,
    step_deadline_s=120,
)


def settings(zero_stage, **changes):
    extra = {"deepspeed": DIVIDE_ALL} if zero_stage == 3 else {}
    return BASE.model_copy(update={"zero_stage": zero_stage, **extra, **changes})


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("dense") / "policy", tied=True)


@pytest.fixture(scope="module")
def moe_policy(tmp_path_factory):
    return save_moe_policy(tmp_path_factory.mktemp("moe") / "policy")


@pytest.fixture(scope="module")
def curve(one_rank, policy, tmp_path_factory):
    """(metrics of each step, weights afterwards) of one rank."""
    learner = one_rank.begin(policy, BASE)
    metrics = train(learner, range(NUM_STEPS))
    return metrics, published(learner, tmp_path_factory.mktemp("curve") / "weights")


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_two_ranks_reproduce_the_curve_of_one(two_ranks, policy, curve, zero_stage, tmp_path):
    expected, weights = curve
    learner = two_ranks.begin(policy, settings(zero_stage))
    metrics = train(learner, range(NUM_STEPS))
    losses = [m["loss"] for m in expected]
    assert max(losses[3:]) - min(losses[3:]) > 1  # else any curve would do
    for found, wanted in zip(metrics, expected, strict=True):
        assert found.keys() == wanted.keys()
        for name in found.keys() - {"step_s"}:
            assert found[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-4), name
    assert largest_difference(published(learner, tmp_path / "weights"), weights) < 1e-4

    # A single sequence without a number, on one of the ranks, stops all of them.
    skipped = asyncio.run(learner.step(batch_of(poisoned_samples(), micro_tokens=64)))
    assert math.isnan(skipped["loss"])
    assert skipped["skipped_steps"] == 1
    assert largest_difference(published(learner, tmp_path / "after"), weights) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_batch_without_a_number_is_skipped_in_bf16_too(two_ranks, policy, zero_stage, tmp_path):
    learner = two_ranks.begin(policy, settings(zero_stage, dtype="bfloat16"))
    train(learner, range(2))
    before = published(learner, tmp_path / "before")
    metrics = asyncio.run(learner.step(batch_of(poisoned_samples(), micro_tokens=64)))
    assert metrics["skipped_steps"] == 1
    assert largest_difference(published(learner, tmp_path / "after"), before) == 0
    (metrics,) = train(learner, range(2, 3))
    assert metrics["skipped_steps"] == 0
    assert largest_difference(published(learner, tmp_path / "later"), before) > 0


LORA = LoraSettings(r=4, alpha=8)
KL = {"loss": LossSettings(kl_coefficient=0.5)}
BF16 = {"dtype": "bfloat16"}
CHECKPOINTING = {"gradient_checkpointing": True}
slow = partial(pytest.param, marks=pytest.mark.slow)


def assert_neighbours(first, second):
    """Hardly a bf16 weight differs, and then by one rounding of fp32 masters that nearly agree."""
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=2**-7, atol=1e-5)
        assert (second[name] != weight).float().mean() < 0.01, name


@pytest.mark.parametrize(
    ("zero_stage", "lora", "changes"),
    [
        pytest.param(3, LORA, KL, id="adapter-reference-3"),
        slow(2, LORA, KL, id="adapter-reference-2"),
        slow(3, None, KL, id="reference-3"),
        pytest.param(3, None, BF16 | CHECKPOINTING, id="bf16-checkpointing-3"),
        slow(1, None, BF16, id="bf16-1"),
        slow(2, LORA, CHECKPOINTING, id="adapter-checkpointing-2"),
    ],
)
def test_every_way_to_train_gives_the_same_on_two_ranks(
    one_rank, two_ranks, policy, tmp_path, zero_stage, lora, changes
):
    single = one_rank.begin(policy, settings(2, **changes), lora=lora)
    several = two_ranks.begin(policy, settings(zero_stage, **changes), lora=lora)
    expected, found = train(single, range(4)), train(several, range(4))
    for name in {"loss", "grad_norm", "k3", "ref_kl"} & expected[0].keys():
        assert [m[name] for m in found] == pytest.approx(
            [m[name] for m in expected], rel=1e-5, abs=1e-6
        )
    weights = [published(single, tmp_path / "one"), published(several, tmp_path / "two")]
    if changes is BF16:
        assert_neighbours(*weights)
    else:
        assert largest_difference(*weights) < 1e-5
    scores = [
        asyncio.run(learner.score_tokens([[5, 60, 7], [9, 8]])) for learner in (single, several)
    ]
    assert scores[0][0] == pytest.approx(scores[1][0], abs=1e-5)


@pytest.mark.parametrize("expert_parallel", [1, 2])
@pytest.mark.parametrize(
    "zero_stage",
    [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)],
)
def test_a_mixture_of_experts_trains_and_leaves_as_a_checkpoint_of_its_kind(
    one_rank, two_ranks, moe_policy, tmp_path, zero_stage, expert_parallel
):
    single = one_rank.begin(moe_policy, BASE)
    several = two_ranks.begin(moe_policy, settings(zero_stage, expert_parallel=expert_parallel))
    expected, found = train(single, range(4)), train(several, range(4))
    assert [m["loss"] for m in found] == pytest.approx([m["loss"] for m in expected], abs=1e-5)
    weights = [published(single, tmp_path / "one"), published(several, tmp_path / "two")]
    assert largest_difference(*weights) < 5e-5
    before = read_checkpoint(moe_policy)
    moved = largest_difference(before, weights[1])
    assert moved > 1e-3  # and the names are those of the checkpoint, expert by expert

    asyncio.run(several.save_policy(tmp_path / "saved", str(moe_policy)))
    saved = read_checkpoint(tmp_path / "saved")
    assert largest_difference(saved, weights[1]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    ids = [5, 60, 7, 100, 9]
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    (scores,) = asyncio.run(several.score_tokens([ids]))
    assert scores == pytest.approx(
        logprobs.gather(-1, torch.tensor(ids)[1:, None])[:, 0].tolist(), abs=1e-4
    )


def ranks(*orders, deadline_s=60.0):
    """A learner whose ranks do as they are told, without torch."""

    class Rank:
        def __init__(self, order):
            self._order = order

        def score_tokens(self, sequences):
            if self._order == "diverge":
                raise DivergenceError("lower the learning rate")
            if self._order == "fail":
                raise OSError(28, "No space left on device")
            if self._order == "hang":
                time.sleep(600)
            return self._order

        def save_adapter(self, directory):
            return "alive"

        def can_share_prompts(self):
            if self._order == "die":
                os._exit(1)
            time.sleep(600)

    actors = [
        create_actor(Rank, order, resources=ActorResources(cpus=0.1), environment={})
        for order in orders
    ]
    ray.get([actor.__ray_ready__.remote() for actor in actors])
    return RemoteLearner(actors, deadline_s)


def is_dead(learner):
    with pytest.raises(EngineError, match=r"rank \d died"):
        asyncio.run(learner.save_adapter("nowhere"))
    return True


def test_what_all_ranks_agree_on_leaves_them_alive(cluster):
    learner = ranks("diverge", "diverge")
    with pytest.raises(DivergenceError, match="lower the learning rate"):
        asyncio.run(learner.score_tokens([]))
    asyncio.run(learner.save_adapter("nowhere"))
    learner.stop()


def test_ranks_that_wait_for_one_that_failed_are_ended_with_its_reason(cluster, monkeypatch):
    monkeypatch.setattr(learner_ranks, "GRACE_S", 0.5)
    learner = ranks("hang", "fail")
    with pytest.raises(StageError, match=r"learner rank 1 failed: OSError: .*No space left"):
        asyncio.run(learner.score_tokens([]))
    assert is_dead(learner)


def test_ranks_past_their_deadline_are_named_and_ended(cluster):
    learner = ranks("go", "hang", deadline_s=2.0)
    with pytest.raises(EngineError, match=r"ranks \[1\] were not done after 2 s.*step_deadline_s"):
        asyncio.run(learner.score_tokens([]))
    assert is_dead(learner)


def test_what_the_first_rank_alone_is_asked_has_the_same_end(cluster):
    learner = ranks("die", "go")
    with pytest.raises(EngineError, match="learner rank 0 died"):
        asyncio.run(learner.can_share_prompts())
    with pytest.raises(EngineError, match="learner rank 0 died"):
        asyncio.run(learner.node_id())
    late = ranks("go", "go", deadline_s=2.0)
    with pytest.raises(EngineError, match=r"ranks \[0\] were not done after 2 s"):
        asyncio.run(late.can_share_prompts())
    assert is_dead(learner)
    assert is_dead(late)


def test_more_ranks_than_devices_are_refused_at_once(policy, cluster):
    began = time.monotonic()
    with pytest.raises(
        SettingsError, match=r"room for 0 of the 64 actors of learner.*There is: .* \d+ CPUs"
    ):
        start_learner(
            str(policy),
            BASE,
            temperature=1.0,
            max_age=1,
            max_tokens=1,
            num_steps=1,
            seed=0,
            lora=None,
            checkpoint=None,
            resources=LearnerResources(cpus=100, ranks=64),
            deadline_s=60,
        )
    assert time.monotonic() - began < 10


def test_the_rank_that_writes_weights_clears_what_one_before_it_left(tmp_path, monkeypatch):
    """On a node without a driver nobody else would."""
    monkeypatch.setattr(learner_actor, "DeepSpeedLearner", lambda *_, **__: None)
    scratch, other = tmp_path / "learner", tmp_path / "other"
    for directory in (scratch, other):
        write_weights({"a": torch.ones(1)}, directory / "1.7")
    learner_actor.LearnerActor("model", BASE, rank=1).ready("127.0.0.1:1")
    assert (scratch / "1.7").exists()
    for _ in range(2):  # there need not be any
        learner_actor.LearnerActor("model", BASE, rank=0, scratch=str(scratch)).ready("127.0.0.1:1")
        assert not scratch.exists()
    assert (other / "1.7").exists()


@pytest.mark.parametrize(
    ("dtype", "lora", "warned"),
    [("bfloat16", LORA, True), ("float32", LORA, False), ("bfloat16", None, False)],
)
def test_an_adapter_that_is_rounded_when_it_is_merged_is_told(
    monkeypatch, capsys, dtype, lora, warned
):
    class Started(Exception):
        pass

    def start(*_, **__):
        raise Started

    monkeypatch.setattr(learner_ranks, "refuse_more_than_there_is", lambda _: None)
    monkeypatch.setattr(learner_ranks, "Reservation", start)
    with pytest.raises(Started):
        start_learner(
            "model",
            BASE.model_copy(update={"dtype": dtype}),
            temperature=1.0,
            max_age=1,
            max_tokens=1,
            num_steps=1,
            seed=0,
            lora=lora,
            checkpoint=None,
            resources=LearnerResources(),
            deadline_s=60,
        )
    said = capsys.readouterr().err
    assert ("policy.lora is merged into bfloat16" in said) is warned
    assert ("Set rl.learner.dtype to float32" in said) is warned


def test_experts_are_divided_only_where_they_can_be(one_rank, two_ranks, policy, moe_policy):
    with pytest.raises(SettingsError, match=r"expert_parallel = 2 is for .*qwen3_moe.* a qwen3:"):
        two_ranks.begin(policy, settings(2, expert_parallel=2))
    with pytest.raises(SettingsError, match=r"does not divide resources.learner.ranks = 1"):
        one_rank.begin(moe_policy, settings(2, expert_parallel=2))


@pytest.mark.parametrize("kind", ["cispo", "gspo", "dr_grpo"])
def test_a_rank_without_anything_to_learn_from_changes_nothing(
    one_rank, two_ranks, policy, tmp_path, kind
):
    """A single sequence for two ranks."""
    weights = []
    for hosts, name in ((one_rank, "one"), (two_ranks, "two")):
        learner = hosts.begin(policy, settings(2, loss=LossSettings(kind=kind)))
        batch = batch_of(random_samples(1, num_samples=1), micro_tokens=64)
        metrics = asyncio.run(learner.step(batch))
        weights.append((metrics["loss"], published(learner, tmp_path / name)))
    assert weights[0][0] == pytest.approx(weights[1][0], abs=1e-6)
    assert largest_difference(weights[0][1], weights[1][1]) < 1e-6
