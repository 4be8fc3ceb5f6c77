"""Run by test_workers_engine_kinds.py: a cluster of two nodes, the engine on the other one, which
is then taken away. Writes what was seen to a file, because Ray writes to stdout as well.

    python two_nodes.py POLICY SCRATCH RESULT
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import ray
from engine_models import request
from ray.cluster_utils import Cluster
from test_workers_engine_kinds import HandMade, publisher, start

from posttrain.types import PolicyVersion
from posttrain.workers.cluster import connect, disconnect
from posttrain.workers.transport import this_node


async def see(policy: Path, scratch: Path, cluster: Any, second: Any) -> dict[str, Any]:
    pool = await start(policy)
    (replica,) = pool._replicas
    source = HandMade(policy)
    publish = publisher(source, pool, policy, scratch).publish
    seen = {"elsewhere": replica._placement.node_id != this_node(), "mismatches": []}
    for step in (1, 2):
        source.move(0.1)
        metrics = await publish(PolicyVersion(1, step))
        seen["mismatches"].append(metrics["mismatch_max"])
    cluster.remove_node(second, allow_graceful=False)
    cluster.add_node(num_cpus=1)
    rollouts = await pool.generate(request("after", "the", num_rollouts=2, max_tokens=8))
    seen["served"] = sorted({str(span.version) for r in rollouts for span in r.version_spans})
    source.move(0.1)
    metrics = await publish(PolicyVersion(1, 3))
    seen["mismatches"].append(metrics["mismatch_max"])
    seen["replaced"] = metrics["replaced_engines"]
    pool.stop()
    return seen


def main() -> None:
    policy, scratch, result = map(Path, sys.argv[1:])
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    other = nodes.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = nodes.address
    connect()
    assert len(ray.nodes()) == 2
    result.write_text(json.dumps(asyncio.run(see(policy, scratch, nodes, other))))
    disconnect()
    nodes.shutdown()


if __name__ == "__main__":
    main()
