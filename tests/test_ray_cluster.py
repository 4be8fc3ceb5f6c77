"""The same run on a Ray cluster: as a job that is stopped and submitted again, and on three nodes
of which one is lost."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from posttrain.audit import audit
from posttrain.metrics import read_metrics
from posttrain.run_dir import RunDir
from posttrain.stages.rl_checkpoint import RLCheckpoints, read_state

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
GROUPS_PER_STEP = 4
SMALL = (
    "stages=[rl]",
    "tasks.train=[{source: starter, size: 64}]",
    "tasks.held_out=[{source: starter, size: 8}]",
    "eval.num_samples=8",
    f"rl.groups_per_step={GROUPS_PER_STEP}",
)
DEADLINE_S = 600


def steps_of(run: RunDir) -> list[int]:
    if not run.metrics_path.exists():
        return []
    return [r["step"] for r in read_metrics(run.metrics_path) if "step" in r and "event" not in r]


def wait_for(what: Callable[[], bool], tell: Callable[[], str]) -> None:
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < DEADLINE_S, tell()
        time.sleep(0.2)


def check_finished(run: RunDir, *, steps: int, attempts: int) -> None:
    assert run.stages()["rl"].state == "done"
    assert (run.policy_dir / "model.safetensors").exists()
    report = audit(run.ledger_path)
    assert report.ok, report.describe()
    assert report.num_attempts == attempts
    assert report.counts["trained"] == steps * GROUPS_PER_STEP
    assert (report.counts["in_flight"], report.num_provisional) == (0, 0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Head:
    """A cluster of one node as `ray start --head` makes it, and `ray job` on it."""

    def __init__(self, scratch: Path) -> None:
        self._dashboard = f"http://127.0.0.1:{(port := free_port())}"
        self._environment = {
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_worker_niceness": "0",
        }
        self._environment.pop("RAY_ADDRESS", None)
        # It stays, and ends what it started when it is ended. `ray stop` would end every Ray on
        # this machine.
        self._node = psutil.Popen(
            [
                *(str(BIN / "ray"), "start", "--head", "--block", f"--port={free_port()}"),
                *(f"--dashboard-port={port}", f"--dashboard-agent-listen-port={free_port()}"),
                *(f"--ray-client-server-port={free_port()}", "--num-cpus=2"),
                f"--temp-dir={scratch}",
            ],
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def job(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command, *rest = arguments
        return self._ray("job", command, f"--address={self._dashboard}", *rest, check=check)

    def submit(self, name: str, *arguments: str, check: bool = True) -> str:
        """What was said. The agent that takes jobs is up some seconds after `ray start`."""
        began = time.monotonic()
        while True:
            done = self.job("submit", f"--submission-id={name}", *arguments, check=False)
            told = done.stdout + done.stderr
            early = "No available agent" in told or "Failed to connect" in told
            if not early or time.monotonic() - began > DEADLINE_S:
                assert (done.returncode == 0) is check, told
                return told
            time.sleep(2)

    def status(self, name: str) -> str:
        return self.job("status", name).stdout

    def stop(self) -> None:
        started = self._node.children(recursive=True)
        self._node.terminate()
        psutil.wait_procs([self._node, *started], timeout=30)
        for process in started:
            if process.is_running():
                process.kill()

    def _ray(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(BIN / "ray"), *arguments],
            cwd=ROOT,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done


@pytest.fixture
def head() -> Iterator[Head]:
    scratch = Path(f"/tmp/rh-{os.getpid()}")  # sockets below it have long names
    started = Head(scratch)
    yield started
    started.stop()
    shutil.rmtree(scratch, ignore_errors=True)


def test_a_job_is_submitted_watched_stopped_submitted_again_and_done(
    head: Head, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    # Ray gives a job 3 s between SIGTERM and SIGKILL unless told otherwise.
    patience = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}})
    entry = (
        *("--working-dir", ".", "--runtime-env-json", patience),
        *("--", "posttrain", "run", "configs/quickstart.yaml", *SMALL),
    )

    refused = head.submit("relative", *entry, check=False)
    assert "run.dir: runs/quickstart is relative" in refused

    submit = (*entry, f"run.dir={run.path}", "rl.num_steps=60")
    head.submit("first", "--no-wait", *submit)
    wait_for(lambda: 2 in steps_of(run), lambda: head.job("logs", "first").stdout)
    assert "RUNNING" in head.status("first")
    head.job("stop", "first")
    wait_for(lambda: "RUNNING" not in head.status("first"), lambda: head.status("first"))
    assert "was stopped" in head.status("first"), head.job("logs", "first").stdout
    assert "stops after the step under way, with a checkpoint" in head.job("logs", "first").stdout

    stopped_at = max(steps_of(run))
    checkpoint = RLCheckpoints(run.stage_dir("rl"), keep=2).latest()
    assert checkpoint is not None, head.job("logs", "first").stdout
    assert read_state(checkpoint).step == stopped_at
    assert stopped_at % 20  # rl.checkpoint_every is 20: it was made for the signal
    assert run.stages()["rl"].state == "running"
    assert audit(run.ledger_path).ok

    head.submit("second", *submit)
    assert "succeeded" in head.status("second")
    assert f"goes on from step {stopped_at}" in head.job("logs", "second").stdout
    assert sorted(steps_of(run)) == list(range(1, 61))  # none of them twice
    check_finished(run, steps=60, attempts=2)


def test_a_node_with_an_engine_is_lost_and_the_run_ends_well(tmp_path: Path) -> None:
    """Three nodes: the engine fits on the second or the third, everything else on the first."""
    run = RunDir(tmp_path / "run")
    log = tmp_path / "log"
    with log.open("w") as output:
        done = subprocess.run(
            [
                *(sys.executable, Path(__file__).with_name("three_nodes.py"), run.path),
                *(*SMALL, "rl.num_steps=8"),
            ],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=DEADLINE_S,
        )
    told = log.read_text()
    assert done.returncode == 0, told[-8000:]
    seen = json.loads(told.splitlines()[-1])
    assert seen["nodes"] == 3
    assert seen["code"] == 0, told[-8000:]
    assert "generator 0 died; another engine takes its place" in told
    check_finished(run, steps=8, attempts=1)
    records = {r["step"]: r for r in read_metrics(run.metrics_path) if "publish/pause_s" in r}
    assert max(records[step]["publish/replaced_engines"] for step in records) == 1


def test_a_cluster_that_is_too_small_is_refused_before_anything_is_taken(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "posttrain.cli", "run", "configs/quickstart.yaml"]
    asked = (f"run.dir={tmp_path / 'run'}", "resources.rollout.replicas=1000")
    done = subprocess.run(
        [*command, *asked], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "of the 1000 actors of rollout" in last
    assert "Asked for: rollout 1000 × (1 CPUs, 0 GPUs)" in last
    assert "There is: " in last
    assert not RunDir(tmp_path / "run").ledger_path.exists()
