"""One place in the pool: real Ray actors that die, hang and come late, with no engine in them."""

import asyncio
import os
import time
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import ObjectLostError

from posttrain.errors import EngineError, MismatchError, ModelError
from posttrain.types import GenerationRequest, PolicyVersion, Sampling
from posttrain.workers import replica as replica_module
from posttrain.workers.agreement import ModelFacts
from posttrain.workers.generator_actor import Placement
from posttrain.workers.replica import EngineLost, Replica
from posttrain.workers.settings import ActorResources, EngineSettings
from posttrain.workers.transport import PublishedWeights, this_node
from posttrain.workers.weights import write_weights

pytest_plugins = ["engine_fixtures"]
pytestmark = pytest.mark.engine

VERSION = PolicyVersion(1, 0)


def fake_actor(log):
    """An actor class that notes its starts in `log`, and whose requests name what happens."""

    class FakeActor:
        def __init__(self, model, version, settings):
            self._model = model
            self._stalled_s = 0.0

        async def ready(self):
            with log.open("a") as file:
                file.write(f"{os.getpid()}\n")
            if self._model == "broken":
                raise ModelError("no weights there")
            node_id = ray.get_runtime_context().get_node_id()
            return Placement(node_id=node_id, facts=ModelFacts(vocab_size=1, tokenizer=""))

        async def generate(self, request):
            match request.request_id:
                case "die":
                    os._exit(1)
                case "stall":
                    self._stalled_s = 100.0
                    await asyncio.sleep(1000)
                case "block":
                    time.sleep(1000)
                case "slow":
                    await asyncio.sleep(1)
                case "long":
                    await asyncio.sleep(1000)
            return (request.request_id,)

        async def tokens_written(self, request_id):
            return 3

        async def stalled_s(self):
            return self._stalled_s

        async def update_weights(self, delivery, version, published):
            if version.step == 1:
                await asyncio.sleep(1000)
            if version.step == 2:
                raise MismatchError("1 of 1 tensors")
            if version.step == 4:
                raise RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB")
            return {"pause_s": 0.25, "reprefilled_tokens": 3.0}

        async def close(self):
            pass

    return FakeActor


@pytest.fixture
async def place(cluster, tmp_path, monkeypatch):
    """A started replica, and the pids of all actors that it has had."""
    log = tmp_path / "starts"
    monkeypatch.setattr(replica_module, "GeneratorActor", fake_actor(log))
    settings = EngineSettings(hang_deadline_s=2.0, update_deadline_s=2.0, max_restarts=1)
    place = Replica("generator 7", "model", VERSION, settings, ActorResources(cpus=0.1), 60)
    place.starts = lambda: [int(pid) for pid in log.read_text().split()]
    await place.start()
    place.serve()
    yield place
    place.stop()


def ask(request_id):
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=(1,),
        num_rollouts=2,
        sampling=Sampling(max_tokens=4),
    )


async def weights(tmp_path, step):
    import torch

    directory = tmp_path / f"1.{step}"
    write_weights({"w": torch.zeros(1)}, directory)
    version = PolicyVersion(1, step)
    return await PublishedWeights.staged(directory, version, this_node(), deadline_s=60)


async def test_all_who_wait_for_a_lost_engine_learn_it_and_the_next_one_answers(place):
    for how in ("die", "stall", "block"):
        waiting = [asyncio.create_task(place.generate(ask(what))) for what in ("slow", how)]
        answered, lost = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(lost, EngineLost)
        assert answered == ("slow",) or isinstance(answered, EngineLost)
        assert (place.serving, place.outstanding) == (False, 0)
        # Whoever chose this place before that learns it as well.
        with pytest.raises(EngineLost, match="has no engine at the moment"):
            await place.generate(ask("b"))
        with pytest.raises(EngineLost, match="has no engine at the moment"):
            await place.score_tokens([[1, 2]], "probe")
        assert await place.tokens_written("b") is None
        await place.restart()
        assert not place.serving  # the pool says when
        assert await place.generate(ask("b")) == ("b",)
    assert len(set(place.starts())) == 4


async def test_no_number_of_open_requests_keeps_an_engine_from_saying_how_it_is(place):
    """Ray by itself would let whatever comes after the thousandth wait."""
    waiting = [asyncio.create_task(place.generate(ask("long"))) for _ in range(1100)]
    while place.outstanding < 2 * len(waiting):
        await asyncio.sleep(0)
    assert await place.tokens_written("long") == 3
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_an_answer_that_is_lost_with_its_node_may_be_asked_for_elsewhere(monkeypatch):
    """Ray neither says that the actor died nor that the call failed."""

    async def lost(request):
        raise ObjectLostError("00ff", None, "")

    stopped = []
    monkeypatch.setattr(replica_module, "stop_actor", stopped.append)
    place = Replica("generator 7", "model", VERSION, EngineSettings(), ActorResources(), 60)
    actor = place._actor = SimpleNamespace(generate=SimpleNamespace(remote=lost))
    place.serve()
    with pytest.raises(EngineLost, match="generator 7 lost its answer"):
        await place.generate(ask("a"))
    assert (stopped, place.serving, place.outstanding) == ([actor], False, 0)


async def test_a_version_counts_from_its_confirmation_within_the_deadline(place, tmp_path):
    assert place.version == VERSION
    report = await place.load(await weights(tmp_path, 3))
    assert report == {"pause_s": 0.25, "reprefilled_tokens": 3.0}
    assert place.version == PolicyVersion(1, 3)
    with pytest.raises(MismatchError, match=r"generator 7, 1\.2: 1 of 1 tensors"):
        await place.load(await weights(tmp_path, 2))
    assert (place.version, place.serving) == (PolicyVersion(1, 3), True)
    with pytest.raises(
        EngineLost, match=r"generator 7 did not confirm the weights 1\.1 within 2 s"
    ):
        await place.load(await weights(tmp_path, 1))
    assert place.serving is False
    await place.restart()
    assert place.version == VERSION  # it starts from the checkpoint again


async def test_an_engine_that_fails_to_load_weights_is_never_asked_again(place, tmp_path):
    """Half of them may be in it; what takes its place may fail as well, and that is bounded."""
    why = r"could not load the weights 1\.4: RuntimeError: CUDA out of memory\.$"
    unloadable = await weights(tmp_path, 4)
    for _ in range(2):
        with pytest.raises(EngineLost, match=f"generator 7 {why}"):
            await place.load(unloadable)
        assert place.serving is False
        if len(place.starts()) == 1:
            await place.restart()
    assert place.version == VERSION
    with pytest.raises(EngineError, match=r"7 failed 2 times .*max_restarts = 1 .*It could not"):
        await place.restart()
    assert len(set(place.starts())) == 2


@pytest.mark.slow
async def test_failures_without_an_answer_in_between_are_bounded_and_listed(place):
    for _ in range(2):
        with pytest.raises(EngineLost):
            await place.generate(ask("die"))
        await place.restart()
        assert await place.generate(ask("a")) == ("a",)
    with pytest.raises(EngineLost):
        await place.generate(ask("die"))
    place._model = "broken"
    with pytest.raises(
        EngineError, match=r"7 failed 2 times .*max_restarts = 1 .*It died; then it did not start"
    ):
        await place.restart()
    assert len(place.starts()) == 4
