"""Engines in 16 bits, on several devices, on other machines, and those that cannot be started."""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_models import MAX_MODEL_LEN, PROBES, request, save_policy
from engine_processes import children, gone, processes
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from posttrain.data.chat import ChatFormat
from posttrain.errors import MismatchError, ModelError
from posttrain.inputs import STARTER_POLICY
from posttrain.starter.tasks import starter_prompts
from posttrain.types import GenerationRequest, PolicyVersion, Sampling
from posttrain.workers.generator import GeneratorPool
from posttrain.workers.probe import ProbeSequence
from posttrain.workers.publisher import WeightPublisher
from posttrain.workers.settings import ActorResources, EngineSettings, PublishSettings
from posttrain.workers.transport import this_node
from posttrain.workers.weights import read_checkpoint, with_lm_head, write_weights

pytest_plugins = ["engine_fixtures"]
pytestmark = [pytest.mark.engine, pytest.mark.slow]

DEADLINE_S = 300
ANY_TEXT = [ProbeSequence(tuple(ids), num_prompt_tokens=1) for ids in PROBES]


class HandMade:
    """A source of weights in this process, which change as the test says."""

    def __init__(self, policy):
        self.model = AutoModelForCausalLM.from_pretrained(policy).eval()

    async def node_id(self):
        return this_node()

    async def write_weights(self, directory):
        state = {n: t for n, t in self.model.state_dict().items() if n != "lm_head.weight"}
        write_weights(with_lm_head(state, tied=True), directory)
        return 0.0

    async def score_tokens(self, sequences):
        with torch.no_grad():
            return [
                self.model(torch.tensor([ids]))
                .logits[0, :-1]
                .log_softmax(-1)
                .gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
                .tolist()
                for ids in sequences
            ]

    def move(self, share):
        """Every weight by a random amount, `share` of its tensor's own spread."""
        with torch.no_grad():
            for tensor in self.model.parameters():
                tensor += share * tensor.std(correction=0) * torch.randn_like(tensor)


async def start(policy, **settings):
    return await GeneratorPool.start(
        str(policy),
        PolicyVersion(1, 0),
        EngineSettings(max_model_len=MAX_MODEL_LEN, max_num_seqs=32, **settings),
        replicas=1,
        resources=ActorResources(cpus=0.25),
        deadline_s=DEADLINE_S,
    )


def publisher(source, pool, policy, scratch, probes=ANY_TEXT):
    return WeightPublisher(
        source,
        pool,
        model=policy,
        scratch=scratch,
        probes=probes,
        settings=PublishSettings(probe_every=1),
    )


async def test_a_16_bit_engine_is_held_to_what_the_first_probe_measured(cluster, tmp_path, capsys):
    """Under fp32 weights, with the starter policy and its own answers."""
    torch.manual_seed(0)
    chat = ChatFormat(str(STARTER_POLICY))
    pool = await start(STARTER_POLICY, dtype="bfloat16")
    asked = [
        GenerationRequest(
            request_id=prompt.prompt_id,
            prompt_token_ids=chat.encode(prompt, None),
            num_rollouts=1,
            sampling=Sampling(max_tokens=96),
        )
        for prompt in starter_prompts("held_out", 64, seed=0)
    ]
    answered = await asyncio.gather(*map(pool.generate, asked))
    probes = [ProbeSequence.of(rollout, MAX_MODEL_LEN) for (rollout,) in answered]
    source = HandMade(STARTER_POLICY)
    publish = publisher(source, pool, STARTER_POLICY, tmp_path, probes).publish
    measured = []
    for step in range(20):
        measured.append(await publish(PolicyVersion(1, step + 1)))
        source.move(0.004)  # as much as an optimizer step does
    with capsys.disabled():
        for name in ("mismatch_max", "mismatch_mean", "mismatch_k3"):
            values = [metrics[name] for metrics in measured]
            print(f"\nbf16 {name}: first {values[0]:.3g}, largest {max(values):.3g}", end="")
    assert 1e-4 < measured[0]["mismatch_max"] < 0.2  # more than fp32 may, less than wrong weights

    async def another(directory):
        await HandMade(other).write_weights(directory)

    other = tmp_path / "other"
    source.model.save_pretrained(other)
    source.move(0.04)  # ten steps later
    source.write_weights = another
    with pytest.raises(MismatchError, match=r"more than .*max_growth"):
        await publish(PolicyVersion(1, 99))
    pool.stop()


async def test_an_engine_on_two_devices_takes_weights_and_leaves_nothing_behind(cluster, tmp_path):
    policy = save_policy(tmp_path / "policy", tied=True)
    pool = await start(policy, tensor_parallel=2)
    source = HandMade(policy)
    publish = publisher(source, pool, policy, tmp_path / "scratch").publish
    versions = (PolicyVersion(1, step) for step in itertools.count(1))
    for _ in range(2):
        source.move(0.1)
        assert (await publish(next(versions)))["mismatch_max"] < 1e-4
    (replica,) = pool._replicas
    actor = processes(replica._actor)
    workers = children(actor["VLLM::EngineCor"])
    assert len(workers) >= 2
    asked = asyncio.create_task(
        pool.generate(request("a", "the", num_rollouts=8, max_tokens=MAX_MODEL_LEN - 8))
    )
    await asyncio.sleep(0.2)
    os.kill(workers[-1], signal.SIGKILL)
    assert len(await asked) == 8
    assert await gone([*actor.values(), *workers])
    source.move(0.1)
    assert (await publish(next(versions)))["mismatch_max"] < 1e-4
    pool.stop()


def test_an_engine_on_another_node_gets_weights_and_its_node_may_go(tmp_path):
    policy = save_policy(tmp_path / "policy", tied=True)
    tests, result = Path(__file__).parent, tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, tests / "two_nodes.py", policy, tmp_path / "scratch", result],
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
        env=os.environ | {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"},
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(result.read_text())
    assert seen["elsewhere"]
    assert len(seen["mismatches"]) == 3 and max(seen["mismatches"]) < 1e-4
    assert seen["served"] == ["1.2"]  # by the newest weights, not the checkpoint's
    assert seen["replaced"] == 1.0


def without_a_tensor(policy):
    state = read_checkpoint(policy)
    del state["model.norm.weight"]
    save_file(state, policy / "model.safetensors")


def of_another_shape(policy):
    state = load_file(policy / "model.safetensors")
    state["model.norm.weight"] = torch.ones(3)
    save_file(state, policy / "model.safetensors")


def unknown(policy):
    config = policy / "config.json"
    config.write_text(config.read_text().replace("Qwen3ForCausalLM", "Qwen99ForCausalLM"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (without_a_tensor, "model.norm.weight"),
        (of_another_shape, "torch.Size([3])"),
        (unknown, "Qwen99ForCausalLM"),
    ],
)
async def test_a_model_that_vllm_cannot_load_is_refused_with_the_reason(
    cluster, tmp_path, damage, reason
):
    policy = save_policy(tmp_path / "policy", tied=False)
    damage(policy)
    with pytest.raises(ModelError) as caught:
        await start(policy)
    assert str(policy) in str(caught.value)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 1000
