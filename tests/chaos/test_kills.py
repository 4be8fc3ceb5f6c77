"""A real run on the starter policy whose driver and engines are killed at random moments."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from posttrain.audit import audit
from posttrain.metrics import read_metrics
from posttrain.run_dir import RunDir
from posttrain.stages.rl_checkpoint import RLCheckpoints, read_state
from posttrain.workers.weights import scratch_directory

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

ROOT = Path(__file__).parents[2]
NUM_STEPS, GROUPS_PER_STEP = 16, 8
DEADLINE_S = 900
SURVIVAL_S = 120
"""Two agents of Ray's own notice only after 75 to 80 s that their node is gone."""
SETTINGS = (
    "stages=[rl]",
    "tasks.train=[{source: starter, size: 256}]",
    "tasks.held_out=[{source: starter, size: 16}]",
    f"rl.num_steps={NUM_STEPS}",
    f"rl.groups_per_step={GROUPS_PER_STEP}",
    "rl.checkpoint_every=3",
    "rl.rescreen={every_steps: 4, prompts: 16, samples: 13}",
)


class Driver:
    """`posttrain run` in a process of its own, and every process that it ever started."""

    def __init__(self, run_dir: Path, logs: Path, *overrides: str) -> None:
        command = [sys.executable, "-m", "posttrain.cli", "run", "configs/quickstart.yaml"]
        self._log = (logs / f"{time.monotonic_ns()}.log").open("w+")
        self.process = psutil.Popen(
            [*command, f"run.dir={run_dir}", *SETTINGS, *overrides],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        self._started = {self.process}

    def wait(self, until: Callable[[], bool] = lambda: False) -> int | None:
        """The exit code, or None once `until()`."""
        began = time.monotonic()
        while self.process.poll() is None:
            assert time.monotonic() - began < DEADLINE_S, self.log()
            self._started |= set(self.process.children(recursive=True))
            if until():
                return None
            time.sleep(0.1)
        return self.process.wait()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def kill_an_engine(self) -> bool:
        for child in self.process.children(recursive=True):
            if "EngineCore" in " ".join(child.cmdline()):
                child.kill()
                return True
        return False

    def survivors(self) -> list[psutil.Process]:
        """What is left a while after the driver's end; none of it goes on living."""
        self._log.close()
        given_up = time.monotonic() + SURVIVAL_S
        while (alive := list(filter(_lives, self._started))) and time.monotonic() < given_up:
            time.sleep(0.2)
        for process in alive:
            process.kill()
        return alive

    def log(self) -> str:
        return Path(self._log.name).read_text()[-6000:]


def _lives(process: psutil.Process) -> bool:
    """A zombie has ended: it only waits for a container's init to take note of it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def scratch_of(run_dir: Path) -> Path:
    return scratch_directory(hashlib.sha256(str(run_dir).encode()).hexdigest()[:12])


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    run_dir = RunDir(tmp_path / "run")
    yield run_dir
    shutil.rmtree(scratch_of(run_dir.path), ignore_errors=True)


def steps_recorded(run: RunDir) -> int:
    if not run.metrics_path.exists():
        return 0
    lines = run.metrics_path.read_text().splitlines()
    return sum('"step"' in line and '"event"' not in line for line in lines)


def surviving_steps(run: RunDir) -> dict[int, dict[str, float]]:
    """The record of each step on the surviving lineage: the last one written counts."""
    records = read_metrics(run.metrics_path)
    return {r["step"]: r for r in records if "step" in r and "event" not in r}


def test_three_killed_drivers_and_two_killed_engines(run: RunDir, tmp_path: Path) -> None:
    chance = random.Random(7)
    for _ in range(3):
        driver = Driver(run.path, tmp_path)
        target = steps_recorded(run) + chance.randint(2, 5)
        delay = chance.uniform(0.0, 1.0)
        assert driver.wait(until=lambda target=target: steps_recorded(run) >= target) is None  # type: ignore[misc]
        time.sleep(delay)
        driver.kill()
        assert driver.survivors() == []

    driver = Driver(run.path, tmp_path)
    for _ in range(2):
        target = steps_recorded(run) + chance.randint(1, 2)
        assert driver.wait(until=lambda target=target: steps_recorded(run) >= target) is None  # type: ignore[misc]
        assert driver.kill_an_engine()
    assert driver.wait() == 0, driver.log()
    assert driver.survivors() == []
    assert not scratch_of(run.path).exists()

    report = audit(run.ledger_path)
    assert report.ok, report.describe()
    assert report.num_attempts == 4
    assert report.num_voided > 0
    assert (report.counts["in_flight"], report.num_provisional) == (0, 0)
    assert report.counts["trained"] == NUM_STEPS * GROUPS_PER_STEP
    steps = surviving_steps(run)
    assert sorted(steps) == list(range(1, NUM_STEPS + 1))
    for name in ("trained", "zero_advantage", "errored", "stale"):
        recorded = sum(step.get(f"draws/{name}", 0) for step in steps.values())
        assert recorded == report.counts[name], name


def test_lock_step_killed_and_resumed_equals_the_undisturbed_run(tmp_path: Path) -> None:
    lock_step = ("rl.max_lag=0", "rl.num_steps=8")
    runs = [RunDir(tmp_path / name) for name in ("undisturbed", "killed")]
    driver = Driver(runs[0].path, tmp_path, *lock_step)
    assert driver.wait() == 0, driver.log()
    assert driver.survivors() == []

    driver = Driver(runs[1].path, tmp_path, *lock_step)
    assert driver.wait(until=lambda: steps_recorded(runs[1]) >= 5) is None, driver.log()
    driver.process.send_signal(signal.SIGKILL)
    driver.process.wait()
    assert driver.survivors() == []
    driver = Driver(runs[1].path, tmp_path, *lock_step)
    assert driver.wait() == 0, driver.log()
    assert driver.survivors() == []

    whole, resumed = (surviving_steps(run) for run in runs)
    assert {record["attempt"] for record in resumed.values()} == {1, 2}
    for step in range(1, 9):
        for name in ("learner/loss", "learner/grad_norm", "pass@1", "trained_tokens"):
            assert resumed[step][name] == pytest.approx(whole[step][name], abs=1e-4), (step, name)
    states = []
    for run in runs:
        checkpoint = RLCheckpoints(run.stage_dir("rl"), keep=2).latest()
        assert checkpoint is not None
        states.append(read_state(checkpoint))
    assert states[0].num_draws == states[1].num_draws
    for name, array in states[0].curriculum.items():
        if array.dtype.kind == "f":
            assert np.allclose(array, states[1].curriculum[name], atol=1e-4), name
        else:
            assert np.array_equal(array, states[1].curriculum[name]), name
    manifests = [json.loads(run.manifest_path.read_text()) for run in runs]
    draws = [m["stages"]["rl"]["metrics"]["trained_by_domain"] for m in manifests]
    assert len(draws[1]) == len(draws[0])
