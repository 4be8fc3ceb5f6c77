"""Follows `posttrain plan --from` once: what a proposed split of devices is worth.

    python tests/benchmarks/device_split.py RUNS [--devices 4] [--engines 1] [--steps 16]

A device is half a core here: each engine and each rank of the learner gets a cgroup of its own
with that quota (version 1, as root), so that what one leaves idle is of no use to the others, as on
GPUs. The first run gives `--engines` of the devices to generation; the second does what the plan
proposes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil

from posttrain.metrics import read_metrics
from posttrain.split import WARM_UP

CGROUPS = Path("/sys/fs/cgroup/cpu")
PERIOD_US = 20_000
CONFIG = "configs/quickstart.yaml"


def settings(engines: int, ranks: int, steps: int) -> list[str]:
    return [
        *("stages=[rl]", "tasks.train=[{source: starter, size: 512}]", f"rl.num_steps={steps}"),
        *("tasks.held_out=[{source: starter, size: 8}]", "eval.num_samples=8"),
        *(f"resources.rollout.replicas={engines}", "resources.rollout.actor.cpus=0.1"),
        *(f"resources.learner.ranks={ranks}", "resources.learner.cpus=0.1"),
        "rl.publish.probe_every=1000",
    ]


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "posttrain.cli", name, CONFIG, *arguments]


def computing(driver: psutil.Process) -> Iterator[list[int]]:
    """The processes of each engine and each rank."""
    for process in driver.children(recursive=True):
        try:
            name = " ".join(process.cmdline())
            if name.startswith("VLLM::EngineCore"):
                yield [process.pid, process.ppid()]
            elif name.startswith("ray::LearnerActor"):
                yield [process.pid]
        except psutil.NoSuchProcess:
            continue


def confine(pids: list[int]) -> Path:
    group = CGROUPS / f"device-{pids[0]}"
    group.mkdir(exist_ok=True)
    (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
    (group / "cpu.cfs_quota_us").write_text(str(PERIOD_US // 2))
    for pid in pids:
        (group / "cgroup.procs").write_text(str(pid))
    return group


def run(directory: Path, overrides: list[str]) -> dict[str, float]:
    """Means over the steady steps."""
    driver = psutil.Popen(command("run", f"run.dir={directory}", *overrides, "--fresh"))
    groups: dict[int, Path] = {}
    while driver.poll() is None:
        for pids in computing(driver):
            if pids[0] not in groups:
                groups[pids[0]] = confine(pids)
        time.sleep(1)
    for group in groups.values():
        group.rmdir()
    assert driver.returncode == 0, driver.returncode
    records = [r for r in read_metrics(directory / "metrics.jsonl") if "rollout_idle_share" in r]
    steady = records[int(len(records) * WARM_UP) :]
    names = ("step_s", "trained_tokens_per_s", "learner_idle_share", "rollout_idle_share")
    return {name: fmean(record[name] for record in steady) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--steps", type=int, default=16)
    asked = parser.parse_args()
    first = settings(asked.engines, asked.devices - asked.engines, asked.steps)
    before = run(asked.runs / "before", first)
    plan = command("plan", *first, "--from", str(asked.runs / "before"), "--json")
    told: dict[str, Any] = json.loads(subprocess.run(plan, capture_output=True, check=True).stdout)
    split = told["split"]
    proposed = split["proposed"]
    print(json.dumps({"before": before, "split": split}))
    if proposed == split["now"]:
        return
    after = run(
        asked.runs / "after", settings(proposed["replicas"], proposed["ranks"], asked.steps)
    )
    gain = after["trained_tokens_per_s"] / before["trained_tokens_per_s"]
    expected = split["step_s"] / split["expected_step_s"]
    print(json.dumps({"after": after, "gain": gain, "expected": expected}))


if __name__ == "__main__":
    main()
