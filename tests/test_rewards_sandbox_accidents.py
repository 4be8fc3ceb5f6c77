"""What dies, who notices, and that nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sandbox_helpers import INSTALLED, QUICK, close_all, open_or_skip, processes_in

from posttrain.errors import SandboxError
from rewards import sandbox as module
from rewards.sandbox import Sandbox, shared_sandbox
from rewards.sandbox_client import Execution, Program, ZygoteClient
from rewards.sandbox_launcher import OWN, SandboxSettings


@pytest.fixture(scope="module", autouse=True)
def _closed_at_the_end() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture(params=INSTALLED)
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return open_or_skip(request.param)


def zygote_of(sandbox: Sandbox | ZygoteClient) -> int:
    """The first process in the sandbox: the one whose parent is its keeper."""
    return int(Path(f"/proc/{sandbox.pid}/task/{sandbox.pid}/children").read_text().split()[0])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_program_is_run_again_when_the_zygote_dies_over_it(sandbox: Sandbox) -> None:
    first, before = zygote_of(sandbox), processes_in(sandbox)
    runs: list[Execution] = []
    sleeper = Program(source="import time; time.sleep(0.5); print('done')")
    thread = threading.Thread(target=lambda: runs.append(sandbox.run(sleeper)))
    thread.start()
    wait_until(lambda: processes_in(sandbox) > before)
    os.kill(first, signal.SIGKILL)
    thread.join()
    assert [run.stdout for run in runs] == [b"done\n"]
    assert not alive(first)


def test_a_program_that_somebody_else_kills_is_run_again(sandbox: Sandbox) -> None:
    """As the kernel does when the machine is out of memory: not the program's doing."""
    before = processes_in(sandbox)
    sleeper = Program(source="import time; time.sleep(1); print('done')")
    runs: list[Execution] = []
    thread = threading.Thread(target=lambda: runs.append(sandbox.run(sleeper)))
    thread.start()
    wait_until(lambda: processes_in(sandbox) > before)
    for pid in processes_in(sandbox) - before:
        os.kill(pid, signal.SIGKILL)
    thread.join()
    assert [run.stdout for run in runs] == [b"done\n"]


def test_a_program_cannot_pass_for_one_that_was_killed(sandbox: Sandbox) -> None:
    """Else it would be unscored instead of wrong."""
    least = "import resource as r; r.setrlimit(r.RLIMIT_CPU, (0, 0))\nwhile True: pass"
    assert "ValueError" in str(sandbox.run(Program(source=least)).failure)
    least = "import resource as r; r.prlimit(0, r.RLIMIT_CPU, (0, 0))\nwhile True: pass"
    assert "PermissionError" in str(sandbox.run(Program(source=least)).failure)
    suicide = """
import os, signal, threading
os.kill(os.getpid(), signal.SIGKILL)
signal.pthread_kill(threading.get_ident(), signal.SIGKILL)
signal.pidfd_send_signal(os.pidfd_open(os.getpid()), signal.SIGKILL)
print("alive")
"""
    assert sandbox.run(Program(source=suicide)).stdout == b"alive\n"


def test_a_zygote_that_dies_twice_says_nothing_about_the_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    open_or_skip("own")
    with Sandbox(QUICK, launchers=[OWN]) as sandbox:
        run = module.ZygoteClient.run
        pids = []

        def kill_and_run(self: Any, program: Program, wall_s: float) -> Execution:
            if program.function != "attempt":  # the probe is left alone
                pids.append(zygote_of(self))
                os.kill(pids[-1], signal.SIGKILL)
            return run(self, program, wall_s)

        with monkeypatch.context() as patch:
            patch.setattr(module.ZygoteClient, "run", kill_and_run)
            with pytest.raises(SandboxError, match="failed 2 times over one program"):
                sandbox.run(Program(source="print(1)"))
        assert len(set(pids)) == 2 and not any(map(alive, pids))
        assert sandbox.run(Program(source="print(1)")).stdout == b"1\n"


def test_an_interrupted_run_leaves_no_answer_for_the_next(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Any, deadline_s: float) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.ZygoteClient, "_receive", interrupt)
        sandbox.run(Program(source="print('first')"))
    assert sandbox.run(Program(source="print('second')")).stdout == b"second\n"


def test_closing_leaves_nothing(sandbox: Sandbox) -> None:
    with Sandbox(QUICK, launchers=[sandbox.launcher]) as other:
        pids = {zygote_of(other), other.pid}
        assert all(alive(pid) for pid in pids if pid)
    wait_until(lambda: not any(alive(pid) for pid in pids if pid))
    assert other.pid is None


OWNER = """
import os, sys, threading
from rewards.sandbox import Sandbox
from rewards.sandbox_client import Program
from rewards.sandbox_launcher import BUBBLEWRAP, OWN, SandboxSettings
sandbox = Sandbox(SandboxSettings(wall_s=100, cpu_s=100), launchers=[{launcher}])
program = Program(source="while True: pass")
threading.Thread(target=sandbox.run, args=(program,), daemon=True).start()
print(sandbox.pid, flush=True)
sys.stdin.read()
"""


def test_everything_dies_with_a_killed_owner(sandbox: Sandbox) -> None:
    code = OWNER.format(launcher="OWN" if sandbox.launcher is OWN else "BUBBLEWRAP")
    owner = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with owner:
        assert owner.stdout is not None
        keeper = int(owner.stdout.readline())

        def descendants(pid: int) -> list[int]:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            return [pid, *(below for child in children for below in descendants(int(child)))]

        wait_until(lambda: len(descendants(keeper)) == 3)  # keeper, zygote, program
        pids = descendants(keeper)
        owner.kill()
    wait_until(lambda: not any(map(alive, pids)))


def test_one_sandbox_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    open_or_skip("own")
    settings = SandboxSettings(memory_mb=300)
    shared_sandbox.cache_clear()
    try:
        program = Program(source="def f(x): return eval(x)", function="f", arguments=("6 * 7",))
        assert shared_sandbox(settings).run(program).result == b"42"
        assert shared_sandbox(settings) is shared_sandbox(SandboxSettings(memory_mb=300))
    finally:
        shared_sandbox(settings).close()
        shared_sandbox.cache_clear()
