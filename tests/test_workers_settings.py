"""Tables of settings that go over defaults."""

import pytest
from pydantic import ValidationError

from posttrain.workers.settings import LearnerResources, merged


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
