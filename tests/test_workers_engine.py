"""A real vLLM engine beside a real learner: what travels, what is published, what is noticed."""

import asyncio
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engine_models import MAX_MODEL_LEN, build_tokenizer, request, save_policy
from safetensors.torch import load_file, save_file

from posttrain.advantages import group_to_samples
from posttrain.errors import MismatchError
from posttrain.packing import pack
from posttrain.types import Message, Outcome, PolicyVersion, Prompt, Reward, RolloutGroup
from posttrain.workers.generator import GeneratorPool
from posttrain.workers.learner_ranks import start_learner
from posttrain.workers.publisher import SharedMemoryPublisher, compare_logprobs
from posttrain.workers.settings import (
    ActorResources,
    EngineSettings,
    LearnerResources,
    LearnerSettings,
    PublishSettings,
)

pytest_plugins = ["engine_fixtures"]
pytestmark = pytest.mark.engine

TEMPERATURE = 0.7
PROBES = [list(range(3, 100)), [5, 60, 7], [127, 126, 125, 124]]


class Stack:
    """One engine and one learner that started from the same checkpoint."""

    def __init__(self, generators, learner, scratch):
        self.generators = generators
        self.learner = learner
        self.scratch = scratch
        self._versions = itertools.count(1)

    def next_version(self):
        return PolicyVersion(1, next(self._versions))

    def publisher(self, learner=None):
        return SharedMemoryPublisher(
            learner or self.learner, self.generators, self.scratch, PROBES, PublishSettings()
        )

    async def scores(self, sequences):
        """(the learner's, the engine's) log-probabilities."""
        learned = await self.learner.score_tokens(sequences)
        (served,) = await self.generators.score_tokens(sequences, f"test-{next(self._versions)}")
        return learned, served

    async def train_on(self, rollouts):
        """One step in which every other answer was right."""
        rewards = [
            Reward(
                value=float(right),
                correctness=float(right),
                outcome=Outcome.CORRECT if right else Outcome.WRONG,
            )
            for right in itertools.islice(itertools.cycle((True, False)), len(rollouts))
        ]
        group = RolloutGroup(
            draw_id="draw",
            prompt=Prompt(
                prompt_id="p",
                messages=(Message(role="user", content="the"),),
                reference=None,
                domain="toy",
            ),
            system=None,
            sampling=request("", "", num_rollouts=1, max_tokens=1).sampling,
            rollouts=tuple(rollouts),
            rewards=tuple(rewards),
        )
        batch = pack(
            group_to_samples(group, "mean"),
            row_tokens=MAX_MODEL_LEN,
            micro_tokens=1024,
            pad_token_id=0,
            current=rollouts[0].oldest_version,
        )
        return await self.learner.step(batch)


@pytest.fixture(scope="module", params=["tied", "untied"])
def stack(request, cluster, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    policy = save_policy(directory / "policy", tied=request.param == "tied")
    resources = ActorResources(cpus=0.25)
    with ThreadPoolExecutor() as starting:  # at the same time: each takes many seconds
        learner = starting.submit(
            start_learner,
            str(policy),
            LearnerSettings(learning_rate=3e-2),
            temperature=TEMPERATURE,
            max_age=1,
            max_tokens=40,
            num_steps=100,
            seed=0,
            checkpoint=None,
            resources=LearnerResources(cpus=0.25),
            deadline_s=240,
        )
        generators = GeneratorPool.start(
            str(policy),
            PolicyVersion(1, 0),
            EngineSettings(max_model_len=MAX_MODEL_LEN, max_num_seqs=64),
            replicas=1,
            resources=resources,
            deadline_s=240,
        )
    scratch = directory / "scratch"
    scratch.mkdir()
    yield Stack(generators, learner.result(), scratch)
    generators.stop()
    learner.result().stop()


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
    assert list(stack.scratch.iterdir()) == []

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


class Forger:
    """The learner, except that what it writes for the engines is changed first."""

    def __init__(self, learner, change):
        self.score_tokens = learner.score_tokens
        self._learner = learner
        self._change = change

    async def write_weights(self, directory):
        seconds = await self._learner.write_weights(directory)
        file = f"{directory}/model.safetensors"
        state = load_file(file)
        self._change(state)
        save_file(state, file)
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
    assert list(stack.scratch.iterdir()) == []
    metrics = await stack.publisher().publish(stack.next_version())
    assert metrics["mismatch_max"] < 1e-4


@only_tied
async def test_a_request_that_is_given_up_frees_its_engine(stack):
    long = request("given-up", "the", num_rollouts=16, max_tokens=MAX_MODEL_LEN - 8)
    task = asyncio.create_task(stack.generators.generate(long))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # The engine takes the same id again only if it let go of the first request.
    rollouts = await stack.generators.generate(long)
    assert len(rollouts) == 16
    assert stack.generators._outstanding == [0]


@only_tied
async def test_the_probe_runs_after_the_first_publishes_and_then_now_and_then(stack):
    publisher = SharedMemoryPublisher(
        stack.learner,
        stack.generators,
        stack.scratch,
        PROBES,
        PublishSettings(probe_first=1, probe_every=3),
    )
    probed = ["mismatch_max" in await publisher.publish(stack.next_version()) for _ in range(6)]
    assert probed == [True, False, True, False, False, True]
