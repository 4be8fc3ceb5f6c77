"""Published weights on their way to an engine, and how long they stay."""

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from posttrain.errors import EngineError
from posttrain.types import PolicyVersion
from posttrain.workers import transport
from posttrain.workers.transport import ObjectStore, PublishedWeights, SharedMemory, this_node
from posttrain.workers.weights import read_fingerprint, write_weights

pytest_plugins = ["engine_fixtures"]
pytestmark = pytest.mark.engine

VERSION = PolicyVersion(2, 5)
STATE = {"a": torch.arange(1000.0), "b": torch.ones(3, dtype=torch.bfloat16)}


@pytest.fixture
def directory(cluster, tmp_path):
    write_weights(STATE, tmp_path / "2.5")
    return tmp_path / "2.5"


async def staged(directory, node_id, deadline_s=60.0):
    return await PublishedWeights.staged(directory, VERSION, node_id, deadline_s=deadline_s)


async def received(delivery):
    """What an engine's actor finds, and where."""
    async with delivery.received() as file:
        return load_file(file), file


def is_state(loaded):
    return loaded.keys() == STATE.keys() and all(torch.equal(loaded[n], STATE[n]) for n in STATE)


async def test_an_engine_on_the_same_machine_opens_the_file_itself(directory):
    weights = await staged(directory, this_node())
    assert weights.version == VERSION
    assert weights.fingerprint == read_fingerprint(directory)
    async with weights.delivery(this_node()) as delivery:
        assert isinstance(delivery, SharedMemory)
        loaded, file = await received(delivery)
    assert is_state(loaded)
    assert file == directory / "model.safetensors"


async def test_an_engine_elsewhere_gets_a_copy_that_leaves_nothing_behind(directory):
    weights = await staged(directory, this_node())
    async with weights.delivery("elsewhere") as delivery, weights.delivery("there") as another:
        assert isinstance(delivery, ObjectStore)
        assert another == delivery  # one copy in the object store for all
        loaded, file = await received(delivery)
    assert is_state(loaded)
    assert str(file).startswith("/proc/")
    assert not file.exists()


async def test_weights_of_a_learner_elsewhere_are_taken_from_there(directory, monkeypatch):
    learners_node = this_node()
    monkeypatch.setattr(transport, "this_node", lambda: "the driver's")
    fingerprint = read_fingerprint(directory)
    weights = await staged(directory, learners_node)
    assert weights.fingerprint == fingerprint
    assert not directory.exists()
    async with weights.delivery(learners_node) as delivery:
        loaded, _ = await received(delivery)
    assert is_state(loaded)
    weights.retire()


async def test_weights_that_do_not_reach_the_object_store_in_time_end_the_run(
    directory, monkeypatch
):
    late = r"within 0\.2 s \(resources\.rollout\.engine\.update_deadline_s\)"
    learners_node = this_node()
    weights = await staged(directory, learners_node, deadline_s=0.2)
    with monkeypatch.context() as slow:
        slow.setattr(transport, "_read", lambda directory: time.sleep(1))
        with pytest.raises(EngineError, match=rf"2\.5 are not stored .*{late}"):
            async with weights.delivery("elsewhere"):
                pass
    monkeypatch.setattr(transport, "this_node", lambda: "the driver's")
    monkeypatch.setattr(transport, "_take", lambda directory: time.sleep(600))
    with pytest.raises(EngineError, match=rf"2\.5, .* are not fetched {late}"):
        await staged(directory, learners_node, deadline_s=0.2)


async def test_weights_go_when_they_are_retired_and_nobody_loads_them(directory):
    weights = await staged(directory, this_node())
    async with weights.delivery(this_node()):
        async with weights.delivery(this_node()) as late:
            weights.retire()
        assert is_state((await received(late))[0])
    assert not Path(directory).exists()
