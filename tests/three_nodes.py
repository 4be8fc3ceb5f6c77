"""Run by test_ray_cluster.py: `posttrain run` on three nodes, of which the one with the engine is
taken away after a step. The last line says what was seen.

    python three_nodes.py RUN_DIR KEY=VALUE…
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.cluster_utils import Cluster


def holder(nodes: list[Any]) -> Any:
    """The node whose CPUs are all taken: that of the engine."""
    free = available_resources_per_node()
    (found,) = [node for node in nodes if free[node.node_id].get("CPU", 0) < 0.01]
    return found


def main() -> None:
    run_dir, *overrides = sys.argv[1:]
    # In a directory of its own, so that no other Ray on this machine takes it for its cluster.
    scratch = f"/tmp/rn-{os.getpid()}"
    # A GPU that is none, so that there is one place for the learner.
    head = {"num_cpus": 1, "num_gpus": 1, "temp_dir": scratch}
    cluster = Cluster(initialize_head=True, connect=True, head_node_args=head)
    others = [cluster.add_node(num_cpus=2) for _ in range(2)]
    cluster.wait_for_nodes()
    seen: dict[str, Any] = {"nodes": len(ray.nodes())}
    driver = subprocess.Popen(
        [
            *(sys.executable, "-m", "posttrain.cli", "run", "configs/quickstart.yaml"),
            *(f"run.dir={run_dir}", "resources.rollout.actor.cpus=2", "resources.learner.cpus=0"),
            *("resources.learner.gpus=1", *overrides),
        ],
        env={**os.environ, "RAY_ADDRESS": cluster.address},
    )
    metrics = Path(run_dir) / "metrics.jsonl"
    while driver.poll() is None:
        if not (metrics.exists() and '"step": 1,' in metrics.read_text()):
            time.sleep(0.2)
            continue
        cluster.remove_node(holder(others), allow_graceful=False)
        break
    seen["code"] = driver.wait()
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(scratch, ignore_errors=True)
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
