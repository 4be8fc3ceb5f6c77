"""Whether a cluster could ever hold a run: what is certain is said, with all the numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config import load
from posttrain.roles import demands
from posttrain.workers.demand import Demand, Node, why_too_small
from posttrain.workers.settings import ActorResources


def demand(role: str, count: int, cpus: float, gpus: float) -> Demand:
    return Demand(role=role, count=count, each=ActorResources(cpus=cpus, gpus=gpus))


HOSTS = [Node(name=f"10.0.0.{i}", cpus=96, gpus=8) for i in (1, 2)]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ([demand("rollout", 8, 1, 1), demand("learner", 8, 1, 1)], None),
        (
            [demand("rollout", 12, 1, 1), demand("learner", 8, 1, 1)],
            "the roles together need 20 GPUs of 16",
        ),
        (
            [demand("rollout", 2, 1, 16)],
            "the cluster has room for 0 of the 2 actors of rollout, each of which needs one node",
        ),
        # 16 GPUs in all, but only one engine of 5 fits on each node.
        ([demand("rollout", 3, 1, 5)], "room for 2 of the 3 actors of rollout"),
        ([demand("learner", 16, 13, 1)], "room for 14 of the 16 actors of learner"),
        ([demand("rewards", 1, 0, 0)], None),
        ([demand("rollout", 20, 1, 0.8)], "room for 16"),
        # Three tenths are not exactly three times one tenth.
        ([demand("rollout", 160, 0, 0.1)], None),
    ],
)
def test_what_two_hosts_of_eight_hold(asked: list[Demand], why: str | None) -> None:
    found = why_too_small(asked, HOSTS)
    if why is None:
        assert found is None
    else:
        assert found is not None
        assert why in found
        assert "10.0.0.2 96 CPUs and 8 GPUs" in found
        assert asked[0].describe() in found


def test_no_node_holds_nothing() -> None:
    assert "room for 0" in str(why_too_small([demand("rollout", 1, 1, 0)], []))


@given(
    st.lists(st.tuples(st.integers(0, 64), st.integers(0, 8)), min_size=1, max_size=4),
    st.data(),
)
def test_what_was_placed_is_never_refused(
    sizes: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Deal out each node's devices at random: the sum of it must be found to fit."""
    nodes = [Node(name=str(i), cpus=c, gpus=g) for i, (c, g) in enumerate(sizes)]
    placed = []
    for node in nodes:
        cpus = data.draw(st.integers(0, int(node.cpus)))
        gpus = data.draw(st.integers(0, int(node.gpus)))
        placed += [demand("a", 1, cpus, gpus), demand("b", 1, node.cpus - cpus, node.gpus - gpus)]
    assert why_too_small(placed, nodes) is None


def test_a_run_asks_for_what_is_up_at_the_same_time() -> None:
    from pathlib import Path

    quickstart = Path(__file__).parent.parent / "configs" / "quickstart.yaml"

    def roles(*overrides: str) -> dict[str, int]:
        return {d.role: d.count for d in demands(load(quickstart, overrides))}

    assert roles() == {"rollout": 1, "rewards": 1, "learner": 1}
    assert roles("stages=[screen]", "resources.rollout.replicas=3") == {"rollout": 3, "rewards": 1}
    dedicated = "rl.rescreen={every_steps: 5, placement: dedicated}"
    assert roles(dedicated, "resources.judge.replicas=2")["judge"] == 2
    assert "judge" not in roles("rl.rescreen={every_steps: 5}")
