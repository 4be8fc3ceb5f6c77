"""Checkpoints of the learner: training goes on as if nothing had been, or is refused by name."""

import asyncio
import os
import resource
import shutil
import signal
import threading
import time
from functools import partial

import pytest
import ray
import torch
from engine_models import save_moe_policy, save_policy
from learner_hosts import batch_of, largest_difference, published, random_samples, train

from posttrain.errors import EngineError, ModelError, RunDirError, StageError
from posttrain.losses.settings import LossSettings
from posttrain.types import PolicyVersion
from posttrain.workers import checkpoints
from posttrain.workers.learner_ranks import start_learner
from posttrain.workers.settings import LearnerResources, LearnerSettings, LoraSettings

pytest_plugins = ["engine_fixtures", "learner_fixtures"]
pytestmark = pytest.mark.engine

SETTINGS = LearnerSettings(
    learning_rate=1e-3,
    schedule="linear",
    weight_decay=0.1,
    max_grad_norm=0.05,
    logprob_chunk_tokens=16,
    step_deadline_s=120,
)
DIVIDE_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
VERSION = PolicyVersion(1, 3)

save_tied = partial(save_policy, tied=True)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("dense") / "policy", tied=True)


@pytest.fixture(scope="module")
def interrupted(two_ranks, policy, tmp_path_factory):
    """(checkpoint after step 3, metrics of steps 4 to 6, weights after step 6)"""
    directory = tmp_path_factory.mktemp("interrupted")
    learner = two_ranks.begin(policy, SETTINGS, num_steps=6)
    train(learner, range(3))
    checkpoint = directory / "checkpoint"
    asyncio.run(learner.save_checkpoint(checkpoint, VERSION))
    return checkpoint, train(learner, range(3, 6)), published(learner, directory / "weights")


@pytest.fixture(scope="module")
def resumed(interrupted, policy):
    """New processes, as a run starts them."""
    learner = start_learner(
        str(policy),
        SETTINGS,
        temperature=0.7,
        max_age=2,
        max_tokens=40,
        num_steps=6,
        seed=1,  # the checkpoint's random states count
        lora=None,
        checkpoint=interrupted[0],
        resources=LearnerResources(cpus=0.1, ranks=2),
        deadline_s=240,
    )
    yield learner
    learner.stop()


def timeless(metrics):
    return [{k: v for k, v in m.items() if k != "step_s"} for m in metrics]


def test_training_goes_on_bit_by_bit_in_new_processes(resumed, interrupted, tmp_path):
    _, expected, weights = interrupted
    assert timeless(train(resumed, range(3, 6))) == timeless(expected)
    assert largest_difference(published(resumed, tmp_path / "weights"), weights) == 0


def test_a_rank_killed_in_mid_step_ends_all_at_once_with_its_name(resumed):
    victim = resumed._ranks[1]
    pid = ray.get(victim.__ray_call__.remote(lambda actor: os.getpid()))
    batch = batch_of(random_samples(7, num_samples=400), micro_tokens=64)

    def kill():
        time.sleep(0.5)
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    began = time.monotonic()
    killer.start()
    with pytest.raises(EngineError, match="learner rank 1 died"):
        asyncio.run(resumed.step(batch))
    assert time.monotonic() - began < 20
    killer.join()
    with pytest.raises(EngineError):
        asyncio.run(resumed.score_tokens([[1, 2]]))


LORA = LoraSettings(r=4, dropout=0.2)
ZERO_3 = {"zero_stage": 3, "deepspeed": DIVIDE_ALL}
EXPERTS = {"expert_parallel": 2}
REFERENCE = {"loss": LossSettings(kl_coefficient=0.5)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("save_model", "lora", "changes"),
    [
        pytest.param(save_tied, LORA, ZERO_3, id="adapter-3"),
        pytest.param(save_tied, LORA, {}, id="adapter-2"),
        pytest.param(save_tied, None, {"zero_stage": 1}, id="zero-1"),
        pytest.param(save_tied, None, {"zero_stage": 1, "dtype": "bfloat16"}, id="bf16-1"),
        pytest.param(save_tied, None, ZERO_3 | REFERENCE, id="reference-3"),
        pytest.param(save_moe_policy, None, EXPERTS, id="experts-2"),
        pytest.param(save_moe_policy, None, EXPERTS | ZERO_3, id="experts-3"),
    ],
)
def test_every_way_to_train_is_resumed(two_ranks, tmp_path, save_model, lora, changes):
    policy = save_model(tmp_path / "policy")
    settings = SETTINGS.model_copy(update=changes)
    learner = two_ranks.begin(policy, settings, num_steps=6, lora=lora)
    train(learner, range(3))
    asyncio.run(learner.save_checkpoint(tmp_path / "checkpoint-3", VERSION))
    expected = train(learner, range(3, 6))
    weights = published(learner, tmp_path / "expected")

    again = two_ranks.begin(
        policy, settings, num_steps=6, lora=lora, checkpoint=str(tmp_path / "checkpoint-3")
    )
    assert timeless(train(again, range(3, 6))) == timeless(expected)
    assert largest_difference(published(again, tmp_path / "found"), weights) == 0


def test_a_disk_that_is_full_leaves_the_last_checkpoint(one_rank, policy, tmp_path):
    learner = one_rank.begin(policy, SETTINGS)
    train(learner, range(1))
    directory = tmp_path / "checkpoint-1"
    asyncio.run(learner.save_checkpoint(directory, PolicyVersion(1, 1)))
    before = checkpoints.read_manifest(directory)

    def limit_files(actor, size):
        """A write beyond it fails, as on a full disk."""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    rank = one_rank._ranks[0]
    ray.get(rank.__ray_call__.remote(limit_files, 100_000))
    with pytest.raises(StageError, match=r"checkpoint-1 could not be written .*Make room"):
        asyncio.run(learner.save_checkpoint(directory, PolicyVersion(1, 2)))
    ray.get(rank.__ray_call__.remote(limit_files, resource.RLIM_INFINITY))
    assert checkpoints.read_manifest(directory) == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    asyncio.run(learner.save_checkpoint(directory, PolicyVersion(1, 2)))
    assert checkpoints.read_manifest(directory).version == "1.2"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.distributed.DistBackendError])
def test_what_the_disk_did_not_cause_is_not_put_down_to_it(monkeypatch, tmp_path, error):
    """Both are RuntimeErrors, as what torch's writer and reader raise is."""
    dist = checkpoints.dist
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda _: None)
    monkeypatch.setattr(dist, "barrier", lambda: None)

    class Engine:
        def __init__(self, error):
            self._error = error

        def save_checkpoint(self, *_, **__):
            raise self._error("not the disk")

        load_checkpoint = save_checkpoint

    layout = checkpoints.Layout.of(SETTINGS, None, fingerprint="", ranks=1)
    counters = checkpoints.Counters(steps=1, skipped=0)

    def save(engine):
        checkpoints.save(
            engine, tmp_path / "checkpoint", version=VERSION, layout=layout, counters=counters
        )

    with pytest.raises(error, match="not the disk"):
        save(Engine(error))
    with pytest.raises(error, match="not the disk"):
        checkpoints.restore(Engine(error), tmp_path)
    with pytest.raises(StageError, match="Make room"):
        save(Engine(RuntimeError))
    with pytest.raises(RunDirError, match="is damaged"):
        checkpoints.restore(Engine(RuntimeError), tmp_path)


@pytest.fixture
def checkpoint(interrupted, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(interrupted[0], tmp_path / "checkpoint-3")


def refused(hosts, policy, checkpoint, error, message, lora=None, **changes):
    settings = SETTINGS.model_copy(update=changes)
    with pytest.raises(error, match=message):
        hosts.begin(policy, settings, num_steps=6, lora=lora, checkpoint=str(checkpoint))
    return True


def test_a_checkpoint_that_was_cut_short_is_refused(two_ranks, policy, checkpoint):
    states = sorted(checkpoint.rglob("*_optim_states.pt"))
    whole = {file: file.read_bytes() for file in states}
    assert len(whole) == 2
    size = len(whole[states[0]])
    for file, content in whole.items():
        file.write_bytes(content[:-100] + bytes(100))
    assert refused(two_ranks, policy, checkpoint, RunDirError, "is damaged")
    states[0].write_bytes(whole[states[0]][:-100])
    message = rf"cut short: .*{states[0].name} has {size - 100} of {size} bytes"
    assert refused(two_ranks, policy, checkpoint, RunDirError, message)
    states[0].unlink()
    assert refused(two_ranks, policy, checkpoint, RunDirError, f"cut short: .* 0 of {size} bytes")
    (checkpoint / "manifest.json").unlink()
    assert refused(two_ranks, policy, checkpoint, RunDirError, "no whole checkpoint")


def test_a_checkpoint_of_another_learner_is_refused(
    one_rank, two_ranks, policy, interrupted, tmp_path
):
    checkpoint = interrupted[0]
    trained = save_policy(tmp_path / "trained", tied=True, seed=1)
    assert refused(two_ranks, trained, checkpoint, ModelError, "made from another model")
    untied = save_policy(tmp_path / "untied", tied=False)
    assert refused(two_ranks, untied, checkpoint, ModelError, "made from another model")
    ranks = r"resources.learner.ranks = 2, now it is 1"
    assert refused(one_rank, policy, checkpoint, RunDirError, ranks)
    stage = r"rl.learner.zero_stage = 2, now it is 1"
    assert refused(two_ranks, policy, checkpoint, RunDirError, stage, zero_stage=1)
    lora = r"policy.lora = None, now it is"
    assert refused(two_ranks, policy, checkpoint, RunDirError, lora, lora=LoraSettings())
