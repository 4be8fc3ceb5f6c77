"""A real vLLM engine beside a real learner: what travels, what is published, what is noticed."""

import asyncio
import copy
import dataclasses
import itertools
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from engine_models import (
    MAX_MODEL_LEN,
    PROBES,
    TEMPERATURE,
    build_tokenizer,
    request,
    save_policy,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from posttrain.errors import MismatchError, ModelError
from posttrain.types import PolicyVersion, Sampling
from posttrain.workers.engine import VllmEngine
from posttrain.workers.probe import compare_logprobs
from posttrain.workers.settings import EngineSettings
from posttrain.workers.weights import write_weights

pytest_plugins = ["engine_fixtures"]
pytestmark = pytest.mark.engine

only_tied = pytest.mark.parametrize("stack", ["tied"], indirect=True)


@only_tied
async def test_token_ids_travel_and_text_does_not(stack):
    """Tokenising the text of an answer again gives other tokens, which the policy did not write."""
    tokenizer = build_tokenizer()
    rollouts = await stack.generators.generate(
        request("travel", "the quick brown fox", num_rollouts=16, max_tokens=100)
    )
    assert {len(r.rollout_logprobs) - len(r.completion_token_ids) for r in rollouts} == {0}
    assert all(r.text == tokenizer.decode(r.completion_token_ids, True) for r in rollouts)

    ids = [[*r.prompt_token_ids, *r.completion_token_ids] for r in rollouts]
    learned, _ = await stack.scores(ids)
    completions = [
        scores[len(r.prompt_token_ids) - 1 :] for r, scores in zip(rollouts, learned, strict=True)
    ]
    sampled = [list(r.rollout_logprobs) for r in rollouts]
    assert compare_logprobs(sampled, [completions])["mismatch_max"] < 1e-4

    again = [tokenizer(r.text)["input_ids"] for r in rollouts]
    ends = [[2] if r.finish_reason == "stop" else [] for r in rollouts]
    other = [
        i
        for i, r in enumerate(rollouts)
        if [*again[i], *ends[i]] != list(r.completion_token_ids)
        and tokenizer.decode(again[i]) == r.text
    ]
    assert len(other) >= 8  # the same texts, other tokens
    relearned, _ = await stack.scores(
        [[*rollouts[i].prompt_token_ids, *again[i], *ends[i]] for i in other]
    )
    for i, scores in zip(other, relearned, strict=True):
        total = sum(scores[len(rollouts[i].prompt_token_ids) - 1 :])
        assert abs(total - sum(sampled[i])) > 0.1


def reprefilled(rollouts, version):
    """Tokens that `rollouts` had in the cache when `version` came."""
    return sum(
        len(rollout.prompt_token_ids) + span.start
        for rollout in rollouts
        for span in rollout.version_spans
        if span.version == version and span.start > 0
    )


async def test_weights_change_under_running_requests(stack):
    rollouts = await stack.generators.generate(
        request("train", "the lazy dog", num_rollouts=8, max_tokens=64, temperature=TEMPERATURE)
    )
    before, _ = await stack.scores(PROBES)
    metrics = await stack.train_on(rollouts)
    # Engine and learner agree about what was sampled, at a temperature other than 1 too.
    assert metrics["k3_age_0"] < 1e-8
    assert metrics["ess"] == pytest.approx(1.0, abs=1e-4)

    running = [
        asyncio.create_task(
            stack.generators.generate(
                request(f"running-{i}", "the", num_rollouts=8, max_tokens=MAX_MODEL_LEN - 8)
            )
        )
        for i in range(8)
    ]
    publisher = stack.publisher()
    versions = [stack.next_version(), stack.next_version()]
    await asyncio.sleep(0.2)
    published = await publisher.publish(versions[0])
    await stack.train_on(rollouts)
    await publisher.publish(versions[1])
    answered = [rollout for group in await asyncio.gather(*running) for rollout in group]

    assert published["mismatch_max"] < 1e-4
    assert 0 < published["pause_s"] < published["publish_s"]
    learned, served = await stack.scores(PROBES)
    assert compare_logprobs(learned, [served])["mismatch_max"] < 1e-4
    assert compare_logprobs(learned, [before])["mismatch_max"] > 0.1  # both really changed
    assert list(stack.scratch.iterdir()) == [stack.scratch / str(versions[1])]
    assert published["reprefilled_tokens"] == reprefilled(answered, versions[0]) > 0

    assert len(answered) == 64
    for rollout in answered:
        spans = rollout.version_spans
        assert spans[0].start == 0
        assert spans[-1].end == len(rollout.completion_token_ids) == len(rollout.rollout_logprobs)
        assert all(a.end == b.start for a, b in itertools.pairwise(spans))
        assert all(a.version < b.version for a, b in itertools.pairwise(spans))
    assert max(len(rollout.version_spans) for rollout in answered) > 1
    assert {span.version for r in answered for span in r.version_spans} <= {
        PolicyVersion(1, 0),
        *versions,
    }
    fresh = await stack.generators.generate(request("new", "the", num_rollouts=2, max_tokens=4))
    assert {span.version for r in fresh for span in r.version_spans} == {versions[1]}


class Keeper:
    """The learner, except that what it writes for the engines is kept, version by version."""

    def __init__(self, stack, kept):
        self.node_id = stack.learner.node_id
        self.score_tokens = stack.learner.score_tokens
        self._stack = stack
        self._kept = kept

    async def write_weights(self, directory):
        seconds = await self._stack.learner.write_weights(directory)
        kept = shutil.copytree(directory, self._kept / directory.name)
        shutil.copy(self._stack.policy / "config.json", kept)
        return seconds


def spanwise_logprobs(rollout, kept):
    """Of each completion token, under the version that its span names, the whole prefix too."""
    ids = torch.tensor([[*rollout.prompt_token_ids, *rollout.completion_token_ids]])
    start = len(rollout.prompt_token_ids)
    logprobs = []
    for span in rollout.version_spans:
        model = AutoModelForCausalLM.from_pretrained(kept / str(span.version)).eval()
        with torch.no_grad():
            predicted = model(ids).logits[0, :-1].log_softmax(-1)
        own = predicted.gather(1, ids[0, 1:, None])[start - 1 :, 0]
        logprobs += own[span.start : span.end].tolist()
    return logprobs


async def test_fifty_publishes_into_a_running_engine(stack, tmp_path):
    """Weights stay right, no request is lost, and each span's tokens are of its version."""
    publisher = stack.publisher(Keeper(stack, tmp_path), probe_every=10)
    await publisher.publish(first := stack.next_version())
    batch = await stack.generators.generate(
        request("fifty", "the lazy dog", num_rollouts=8, max_tokens=32, temperature=TEMPERATURE)
    )
    answered, published, latest = [], [], [first]
    stop = asyncio.Event()

    async def ask(worker):
        index = 0
        while not stop.is_set():
            since = latest[-1]
            answer = await stack.generators.generate(
                request(f"fifty-{worker}-{index}", "the", num_rollouts=4, max_tokens=180)
            )
            answered.extend((since, latest[-1], rollout) for rollout in answer)
            index += 1
        return index

    workers = [asyncio.create_task(ask(i)) for i in range(4)]
    for _ in range(50):
        await stack.train_on(batch)
        published.append(await publisher.publish(version := stack.next_version()))
        latest.append(version)
    stop.set()
    asked = sum(await asyncio.gather(*workers))

    assert len({rollout.rollout_id for *_, rollout in answered}) == len(answered) == 4 * asked
    for since, until, rollout in answered:
        spans = rollout.version_spans
        assert spans[0].start == 0 and spans[-1].end == len(rollout.completion_token_ids)
        assert all(a.end == b.start for a, b in itertools.pairwise(spans))
        versions = [span.version for span in spans]
        assert versions == sorted(set(versions))
        assert versions[0] >= since
        assert versions[-1] <= max(until, version)
    learned, served = await stack.scores(PROBES)
    assert compare_logprobs(learned, [served])["mismatch_max"] < 1e-4
    assert all(0 < metrics["pause_s"] < metrics["publish_s"] for metrics in published)
    assert sum(metrics["reprefilled_tokens"] for metrics in published) > 0

    several = sorted((r for *_, r in answered), key=lambda r: -len(r.version_spans))[:12]
    assert len(several[-1].version_spans) > 1
    expected = [spanwise_logprobs(rollout, tmp_path) for rollout in several]
    written = [list(rollout.rollout_logprobs) for rollout in several]
    assert compare_logprobs(expected, [written])["mismatch_max"] < 1e-4


class Forger:
    """The learner, except that what it writes for the engines is changed first."""

    def __init__(self, learner, change):
        self.node_id = learner.node_id
        self.score_tokens = learner.score_tokens
        self._learner = learner
        self._change = change

    async def write_weights(self, directory):
        other = directory.with_name("other")
        seconds = await self._learner.write_weights(other)
        state = load_file(other / "model.safetensors")
        shutil.rmtree(other)
        self._change(state)
        write_weights(state, directory)
        return seconds


def forget_the_tied_head(state):
    del state["lm_head.weight"]


def perturb_one_layer(state):
    state["model.layers.1.mlp.down_proj.weight"].mul_(1.01)


def lose_a_number(state):
    state["model.norm.weight"][0] = torch.nan


@only_tied
@pytest.mark.parametrize("change", [forget_the_tied_head, perturb_one_layer, lose_a_number])
async def test_an_engine_with_other_weights_than_the_learner_is_noticed(stack, change):
    rollouts = await stack.generators.generate(
        request("forged", "the lazy dog", num_rollouts=4, max_tokens=16, temperature=TEMPERATURE)
    )
    await stack.train_on(rollouts)
    version = stack.next_version()
    with pytest.raises(MismatchError, match=rf"after publishing {version} .*max_mismatch"):
        await stack.publisher(Forger(stack.learner, change)).publish(version)
    metrics = await stack.publisher().publish(stack.next_version())
    assert metrics["mismatch_max"] < 1e-4


async def test_an_engine_that_loads_weights_is_not_taken_for_stuck():
    """Its core answers nothing meanwhile, for longer than a health check waits."""
    silent = asyncio.Event()
    requests = {"a": SimpleNamespace(detokenizer=SimpleNamespace(num_output_tokens=lambda: 3))}
    llm = SimpleNamespace(
        get_tokenizer=build_tokenizer,
        get_weight_version=silent.wait,
        output_processor=SimpleNamespace(request_states=requests),
    )
    engine = VllmEngine(llm, EngineSettings())
    async with engine._update_lock:
        assert await asyncio.wait_for(engine.stalled_s(), 5) == 0
    with pytest.raises(TimeoutError):  # else it would never be found stuck
        await asyncio.wait_for(engine.stalled_s(), 0.05)
    silent.set()
    began = engine._progressed_at
    await engine.stalled_s()  # what it has written so far is seen for the first time
    assert engine._progressed_at > began
    await asyncio.sleep(0.05)
    assert await engine.stalled_s() >= 0.05


@only_tied
async def test_a_request_that_is_given_up_frees_its_engine(stack):
    long = request("given-up", "the", num_rollouts=16, max_tokens=MAX_MODEL_LEN - 8)
    task = asyncio.create_task(stack.generators.generate(long))
    while not await stack.generators.tokens_written("given-up"):
        assert not task.done()
    assert await stack.generators.tokens_written("unknown") is None
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # The engine takes the same id again only if it let go of the first request.
    rollouts = await stack.generators.generate(long)
    assert len(rollouts) == 16
    assert await stack.generators.tokens_written("given-up") is None
    assert [replica.outstanding for replica in stack.generators._replicas] == [0]


@only_tied
async def test_seeded_prompts_that_do_not_fit_one_step(stack):
    """Lock-step sends all of a step's draws at once. vLLM would prefill the one that crosses its
    token budget in two pieces, and wind back a seeded generator as only a GPU's can be."""
    asked = [
        dataclasses.replace(
            request(f"seeded-{i}", "the", num_rollouts=8, max_tokens=4),
            prompt_token_ids=tuple(3 + (i + j) % 100 for j in range(99)),
            sampling=Sampling(max_tokens=4, seed=i),
        )
        for i in range(8)
    ]
    answered = await asyncio.gather(*map(stack.generators.generate, asked))
    assert [len(rollouts) for rollouts in answered] == [8] * 8
    assert stack.generators._replaced == 0


class Damager(Forger):
    """The learner, except that one bit of its file changes on the way."""

    async def write_weights(self, directory):
        seconds = await self._learner.write_weights(directory)
        with (directory / "model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            (last,) = file.read()
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))
        return seconds


@only_tied
async def test_weights_damaged_on_the_way_are_not_loaded(stack):
    before = await stack.publisher().publish(good := stack.next_version())
    with pytest.raises(MismatchError, match=r"generator 0, 1\.\d+: 1 of \d+ published tensors"):
        await stack.publisher(Damager(stack.learner, None)).publish(stack.next_version())
    fresh = await stack.generators.generate(request("kept", "the", num_rollouts=2, max_tokens=4))
    assert {span.version for r in fresh for span in r.version_spans} == {good}
    assert before["mismatch_max"] < 1e-4


@only_tied
async def test_an_engine_on_another_machine_gets_the_same_weights(stack, monkeypatch):
    """Sent through the object store, as it would be if the two did not share their memory."""
    (replica,) = stack.generators._replicas
    elsewhere = dataclasses.replace(replica._placement, node_id="elsewhere")
    monkeypatch.setattr(replica, "_placement", elsewhere)
    rollouts = await stack.generators.generate(
        request("elsewhere", "the", num_rollouts=8, max_tokens=16, temperature=TEMPERATURE)
    )
    await stack.train_on(rollouts)
    metrics = await stack.publisher().publish(stack.next_version())
    assert metrics["mismatch_max"] < 1e-4


@only_tied
async def test_a_learner_of_another_model_is_refused_before_anything_is_published(stack, tmp_path):
    stack_of_another = copy.copy(stack)
    stack_of_another.policy = save_policy(tmp_path / "other", tied=True)
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"sep_token": "the"})
    tokenizer.save_pretrained(stack_of_another.policy)
    version = stack.next_version()
    with pytest.raises(ModelError, match="the learner's tokenizer gives other ids"):
        await stack_of_another.publisher().publish(version)
    assert not (stack.scratch / str(version)).exists()
