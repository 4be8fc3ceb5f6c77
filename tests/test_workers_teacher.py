"""The teacher's targets against a plain forward pass, and what becomes of a teacher that dies."""

from __future__ import annotations

import asyncio
import math
import os
import signal

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.errors import EngineError, ModelError
from posttrain.starter import POLICY_DIR
from posttrain.teaching.records import TokenSequence, padded_targets
from posttrain.teaching.settings import TargetSettings
from posttrain.workers.settings import TeacherPoolSettings
from posttrain.workers.teacher import CausalTeacher
from posttrain.workers.teacher_pool import TeacherPool

pytest_plugins = ["engine_fixtures"]

V = 102


def sequences(count=9, seed=0):
    """Of 3 to 20 tokens; a random part of each behind the first is learnt, in some nothing."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        ids = rng.integers(3, V, size=rng.integers(3, 20))
        mask = rng.random(len(ids)) < (0 if number == 4 else 0.6)
        mask[0] = False
        made.append(TokenSequence(token_ids=ids, label_mask=mask))
    return made


@pytest.fixture(scope="module")
def model(tiny_policy):
    return AutoModelForCausalLM.from_pretrained(tiny_policy, dtype="float32").eval()


@pytest.fixture(scope="module")
def teacher(tiny_policy):
    settings = TeacherPoolSettings(batch_tokens=50, chunk_tokens=7)
    return CausalTeacher(str(tiny_policy), settings, rank=0, address="127.0.0.1:1")


@torch.no_grad()
def expected(model, sequence, temperature=1.0):
    """log q^τ of every id at each label, `[n, V]`, one sequence at a time."""
    ids = torch.tensor(sequence.token_ids)[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return (logits / temperature).log_softmax(-1)[torch.tensor(sequence.label_mask[1:])]


def labels_of(sequence):
    return torch.tensor(sequence.token_ids[sequence.label_mask])[:, None]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_label_logprobs_are_those_of_a_plain_forward_pass(teacher, model, temperature):
    asked = sequences()
    for sequence, answer in zip(asked, teacher.label_logprobs(asked, temperature), strict=True):
        wanted = expected(model, sequence, temperature).gather(-1, labels_of(sequence)).squeeze(-1)
        np.testing.assert_allclose(answer, wanted, atol=1e-5)


def test_top_k_keeps_the_likeliest_and_the_rest_as_one(teacher, model):
    asked = sequences()
    settings = TargetSettings(kind="top_k", k=5, temperature=0.7)
    for sequence, record in zip(asked, teacher.targets(asked, settings), strict=True):
        soft = expected(model, sequence, 0.7).exp()
        kept, ids = soft.topk(5, -1)
        np.testing.assert_array_equal(record.per_id["ids"].reshape(-1, 5), ids)
        np.testing.assert_allclose(record.per_id["weights"].reshape(-1, 5), kept, rtol=1e-4)
        np.testing.assert_allclose(record.per_label["tail"], 1 - kept.sum(-1), atol=1e-5)
        entropy = -(soft * soft.log()).sum(-1)
        np.testing.assert_allclose(record.per_label["entropy"], entropy, rtol=1e-4)
        # What the gate and the controller read is at τ = 1 all the same.
        exact = expected(model, sequence).gather(-1, labels_of(sequence)).squeeze(-1)
        np.testing.assert_allclose(record.per_label["label_logprobs"], exact, atol=1e-5)


def test_a_k_beyond_the_vocabulary_keeps_everything(teacher):
    asked = [s for s in sequences() if s.num_labels]
    (record, *_) = teacher.targets(asked, TargetSettings(kind="top_k", k=4 * V))
    weights = record.per_id["weights"].reshape(-1, V)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert (record.per_label["tail"] == 0).all()


def test_sampled_targets_are_drawn_from_the_teachers_distribution(teacher, model):
    """10,000 draws at one label: counts within four standard errors of q."""
    (asked,) = sequences(1)
    (record,) = teacher.targets([asked], TargetSettings(samples=10_000))
    targets = padded_targets([record], 10_000)
    q = expected(model, asked).exp().numpy()
    drawn = np.zeros_like(q)
    np.put_along_axis(drawn, targets["ids"], targets["weights"], axis=-1)
    np.testing.assert_allclose(drawn.sum(-1), 1, rtol=1e-5)
    error = np.sqrt(q * (1 - q) / 10_000)
    assert (np.abs(drawn - q) <= 4 * error + 1e-9).mean() > 0.999


def test_targets_made_anew_are_those_that_were_lost(teacher):
    asked = [s for s in sequences() if s.num_labels]
    together = teacher.targets(asked, TargetSettings())
    (alone,) = teacher.targets(asked[3:4], TargetSettings())
    np.testing.assert_array_equal(alone.per_id["ids"], together[3].per_id["ids"])
    np.testing.assert_array_equal(alone.per_id["counts"], together[3].per_id["counts"])


def test_a_target_takes_tens_of_bytes(teacher):
    """Ids of a byte each where the vocabulary has no more, counts likewise."""
    asked = [s for s in sequences() if s.num_labels]
    for record in teacher.targets(asked, TargetSettings()):
        assert record.per_id["ids"].dtype == record.per_id["counts"].dtype == np.uint8
        assert (record.per_id["counts"].sum()) == 50 * len(record.per_label["entropy"])


def test_surplus_embeddings_are_no_tokens(tiny_policy, tmp_path, teacher):
    """Models of one family pad their vocabulary differently; a student may have no such id."""
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype="float32")
    model.resize_token_embeddings(V + 26, mean_resizing=False)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_policy).save_pretrained(tmp_path)
    padded = CausalTeacher(str(tmp_path), TeacherPoolSettings(), rank=0, address="127.0.0.1:1")
    asked = [s for s in sequences() if s.num_labels]
    settings = TargetSettings(kind="top_k", k=4 * V)
    for record, other in zip(
        padded.targets(asked, settings), teacher.targets(asked, settings), strict=True
    ):
        assert record.per_id["ids"].max() < V
        for name in ("label_logprobs", "entropy"):
            np.testing.assert_allclose(record.per_label[name], other.per_label[name], atol=1e-5)


def test_a_sampled_id_that_is_no_token_is_not_heard(teacher):
    """A policy may have more embeddings than there are tokens, and an engine samples among all."""
    ids = np.array([5, 20, V, 30])
    everything = np.array([False, True, True, True])
    (answer,) = teacher.label_logprobs([TokenSequence(token_ids=ids, label_mask=everything)], 1.0)
    assert np.isnan(answer).tolist() == [False, True, False]
    until_there = TokenSequence(token_ids=ids[:2], label_mask=everything[:2])
    np.testing.assert_allclose(answer[:1], teacher.label_logprobs([until_there], 1.0)[0], atol=1e-5)


def test_a_checkpoint_that_does_not_load_is_named(tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        CausalTeacher(
            str(tmp_path / "nowhere"), TeacherPoolSettings(), rank=0, address="127.0.0.1:1"
        )


# --- in actors ------------------------------------------------------------------------------------

TINY = {"cpus": 0.1}


def kill(rank):
    pid = ray.get(rank.__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, signal.SIGKILL)


@pytest.mark.engine
@pytest.mark.slow
def test_copies_share_the_work_and_one_that_is_killed_is_replaced(cluster, tiny_policy, teacher):
    asked = [s for s in sequences(7) if s.num_labels]
    wanted = teacher.targets(asked, TargetSettings())
    pool = TeacherPool(str(tiny_policy), TeacherPoolSettings(**TINY, max_restarts=1), 120)
    try:
        kill(pool._copies[0]._ranks[0])
        records = pool.targets(asked, TargetSettings())
        for record, other in zip(records, wanted, strict=True):
            np.testing.assert_array_equal(record.per_id["ids"], other.per_id["ids"])
            np.testing.assert_allclose(
                record.per_label["entropy"], other.per_label["entropy"], rtol=1e-4
            )
        kill(pool._copies[0]._ranks[0])
        with pytest.raises(EngineError, match="died"):
            pool.label_logprobs(asked, 1.0)
    finally:
        pool.stop()


@pytest.mark.engine
def test_another_model_takes_the_processes_over(cluster, tiny_policy):
    asked = [s for s in sequences(3) if s.num_labels]
    pool = TeacherPool(str(tiny_policy), TeacherPoolSettings(**TINY), 120)
    try:
        rank = pool._copies[0]._ranks[0]
        pool.load(str(POLICY_DIR))
        answers = pool.label_logprobs(asked, 1.0)
        assert pool._copies[0]._ranks == [rank]
        kill(rank)  # the process that takes its place loads the same
        again = pool.label_logprobs(asked, 1.0)
        pool.idle_share()
        scores = asyncio.run(pool.score(asked, 1.0))
        assert 0 <= pool.idle_share() < 1
        assert pool.tokens == sum(len(sequence.token_ids) for sequence in asked)
    finally:
        pool.stop()
    alone = CausalTeacher(str(POLICY_DIR), TeacherPoolSettings(), rank=0, address="127.0.0.1:1")
    plain = alone.label_logprobs(asked, 1.0)
    for answer, other, score, wanted in zip(answers, again, scores, plain, strict=True):
        np.testing.assert_allclose(answer, wanted, atol=1e-5)
        np.testing.assert_allclose(other, wanted, atol=1e-5)
        np.testing.assert_allclose(score, wanted, atol=1e-5)


@pytest.mark.engine
@pytest.mark.slow
def test_a_copy_that_cannot_be_divided_is_refused(cluster, tiny_policy):
    """Its one head of keys and values is no two."""
    with pytest.raises(ModelError, match="num_key_value_heads = 1"):
        TeacherPool(str(tiny_policy), TeacherPoolSettings(**TINY, tensor_parallel=2), 120)


@pytest.mark.engine
@pytest.mark.slow
def test_two_ranks_of_a_copy_answer_as_one(cluster):
    asked = [s for s in sequences(7) if s.num_labels]
    policy = str(POLICY_DIR)
    alone = CausalTeacher(policy, TeacherPoolSettings(), rank=0, address="127.0.0.1:1")
    pool = TeacherPool(policy, TeacherPoolSettings(**TINY, tensor_parallel=2, replicas=2), 120)
    try:
        wanted = alone.label_logprobs(asked, 1.0)
        pool.load(policy)
        for answer, other in zip(pool.label_logprobs(asked, 1.0), wanted, strict=True):
            np.testing.assert_allclose(answer, other, atol=1e-4)
    finally:
        pool.stop()


def test_the_entropy_of_a_uniform_teacher_is_that_of_its_vocabulary(teacher, model):
    """A temperature without bound makes every id as likely."""
    asked = [s for s in sequences() if s.num_labels]
    (record, *_) = teacher.targets(asked, TargetSettings(temperature=1e6))
    np.testing.assert_allclose(record.per_label["entropy"], math.log(V), rtol=1e-5)
