"""What a run asks of a cluster against what the cluster has, without Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from posttrain.workers.settings import ActorResources


@dataclass(frozen=True, kw_only=True)
class Demand:
    """`count` actors of one role that run at the same time, each on one node."""

    role: str
    count: int
    each: ActorResources

    def describe(self) -> str:
        return f"{self.role} {self.count} × ({self.each.cpus:g} CPUs, {self.each.gpus:g} GPUs)"


@dataclass(frozen=True, kw_only=True)
class Node:
    """One machine of a cluster, whoever uses it."""

    name: str
    cpus: float
    gpus: float

    @classmethod
    def of(cls, name: str, resources: Mapping[str, float]) -> Node:
        """From Ray's table of a node's resources."""
        return cls(name=name, cpus=resources.get("CPU", 0.0), gpus=resources.get("GPU", 0.0))

    def describe(self) -> str:
        return f"{self.name} {self.cpus:g} CPUs and {self.gpus:g} GPUs"

    def holds(self, each: ActorResources) -> float:
        """How many actors of that size it could hold, were it free. A share of a GPU is a share of
        one and the same."""
        by_cpus = _times(each.cpus, self.cpus)
        if 0 < each.gpus < 1:
            return min(by_cpus, self.gpus * _times(each.gpus, 1.0))
        return min(by_cpus, _times(each.gpus, self.gpus))


def _times(need: float, have: float) -> float:
    return math.floor(have / need + 1e-9) if need else math.inf


def why_too_small(demands: Sequence[Demand], nodes: Sequence[Node]) -> str | None:
    """Why a cluster could not hold `demands` even if all of it were free; None if nothing says so.

    These are necessary conditions only: whether every actor finds a place shows when it is asked
    for, within a deadline.
    """
    reason = _too_small(demands, nodes)
    if reason is None:
        return None
    asked = "; ".join(demand.describe() for demand in demands)
    there = "; ".join(node.describe() for node in nodes)
    return f"{reason}. Asked for: {asked}. There is: {there}"


def _too_small(demands: Sequence[Demand], nodes: Sequence[Node]) -> str | None:
    for demand in demands:
        room = sum(node.holds(demand.each) for node in nodes)
        if room < demand.count:
            return (
                f"the cluster has room for {room:g} of the {demand.count} actors of {demand.role}, "
                "each of which needs one node"
            )
    for what in ("cpus", "gpus"):
        asked = sum(demand.count * getattr(demand.each, what) for demand in demands)
        there = sum(getattr(node, what) for node in nodes)
        if asked > there + 1e-9:
            return f"the roles together need {asked:g} {what.upper()[:3]}s of {there:g}"
    return None
