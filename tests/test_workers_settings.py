"""Tables of settings that go over defaults."""

import pytest
from pydantic import ValidationError

from posttrain.workers.settings import LearnerResources, RolloutPoolSettings, merged


def test_a_nested_table_changes_only_what_it_names() -> None:
    base = {"zero": {"stage": 2, "overlap": False}, "clip": "auto"}
    changed = merged(base, {"zero": {"overlap": True}, "extra": {"a": 1}})
    assert changed == {"zero": {"stage": 2, "overlap": True}, "clip": "auto", "extra": {"a": 1}}
    assert base == {"zero": {"stage": 2, "overlap": False}, "clip": "auto"}


def test_a_table_and_a_value_replace_each_other() -> None:
    assert merged({"a": {"b": 1}}, {"a": 3}) == {"a": 3}
    assert merged({"a": 3}, {"a": {"b": 1}}) == {"a": {"b": 1}}


def test_ranks_may_not_share_a_gpu_and_may_share_a_core() -> None:
    assert LearnerResources(cpus=0.5, ranks=2).ranks == 2
    assert LearnerResources(gpus=0.5).gpus == 0.5
    with pytest.raises(ValidationError, match=r"2 ranks with 0\.5 GPUs each would share one"):
        LearnerResources(gpus=0.5, ranks=2)


def pool(gpus: float, tensor_parallel: int, **extra: object) -> RolloutPoolSettings:
    engine = {"tensor_parallel": tensor_parallel, "extra": extra}
    return RolloutPoolSettings.model_validate({"actor": {"gpus": gpus}, "engine": engine})


@pytest.mark.parametrize(("gpus", "tensor_parallel"), [(1, 4), (4, 1), (0.5, 2), (1.5, 1)])
def test_an_engine_has_as_many_gpus_as_it_is_spread_over(gpus: float, tensor_parallel: int) -> None:
    with pytest.raises(
        ValidationError, match=rf"tensor_parallel = {tensor_parallel} .*actor\.gpus is {gpus:g};"
    ):
        pool(gpus, tensor_parallel)


@pytest.mark.parametrize(("gpus", "tensor_parallel"), [(0, 1), (0, 2), (0.4, 1), (1, 1), (4, 4)])
def test_an_engine_may_share_a_gpu_or_have_none(gpus: float, tensor_parallel: int) -> None:
    assert pool(gpus, tensor_parallel).engine.tensor_parallel == tensor_parallel


def test_devices_that_vllm_is_asked_for_by_its_own_names_are_not_counted() -> None:
    assert pool(4, 2, pipeline_parallel_size=2).actor.gpus == 4
