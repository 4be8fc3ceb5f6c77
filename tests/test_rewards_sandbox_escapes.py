"""Programs that try to get out or to take the machine with them.

Each is scored as an answer would be; then nothing of it may be left, and the sandbox must go on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from sandbox_cases import EXPECTED, Case, check, score_program
from sandbox_helpers import (
    FORKING,
    INSTALLED,
    PATIENT,
    close_all,
    open_or_skip,
)

from posttrain.types import Outcome
from rewards.sandbox import Sandbox
from rewards.sandbox_client import Program

WRONG, LIMIT, CORRECT = Outcome.WRONG, Outcome.LIMIT, Outcome.CORRECT


@pytest.fixture(scope="module", autouse=True)
def _closed_at_the_end() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture(params=INSTALLED)
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return open_or_skip(request.param)


@pytest.fixture(params=INSTALLED)
def forking_sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return open_or_skip(request.param, FORKING)


@pytest.fixture(params=INSTALLED)
def patient_sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return open_or_skip(request.param, PATIENT)


PRINTS = {"cases": [{"input": "", "output": EXPECTED}]}

CONTAINED = {
    "network": Case(
        "import socket; socket.create_connection(('1.1.1.1', 53), timeout=5); print(1)",
        LIMIT,
        "Address family not supported",
    ),
    "names": Case("import socket; print(socket.gethostbyname('localhost'))", LIMIT, "gaierror"),
    "home": Case("import os; print(os.listdir(os.path.expanduser('~root')))", LIMIT),
    "shadow": Case("print(open('/etc/shadow').read())", LIMIT, "No such file"),
    "environment": Case("import os; print(dict(os.environ))", WRONG, "printed '{}"),
    "parents-environment": Case("print(open('/proc/1/environ').read())", LIMIT, "No such file"),
    "own-memory": Case("open('/proc/self/mem', 'rb')", LIMIT, "No such file"),
    "fork-bomb": Case("import os\nwhile True: os.fork()", LIMIT, "PermissionError"),
    "patient-fork-bomb": Case(
        """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
        """,
        LIMIT,
        "Killed",
    ),
    "subprocess": Case("import subprocess; subprocess.run(['/bin/true'])", LIMIT, "Permission"),
    "other-program": Case(
        "import os; os.execv('/bin/cat', ['cat', '/etc/shadow'])", LIMIT, "No such file"
    ),
    "thread-bomb": Case(
        """
        import threading, time
        while True:
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        """,
        LIMIT,
        "can't start new thread",
    ),
    "patient-memory-bomb": Case(
        """
        x = []
        while True:
            try:
                x.append(bytearray(10**6))
            except MemoryError:
                pass
        """,
        LIMIT,
        "Killed",
    ),
    "mapped-memory": Case(
        """
        import mmap
        maps = [mmap.mmap(-1, 10**8) for _ in range(100)]
        """,
        LIMIT,
        "Cannot allocate memory",
    ),
    "1-gb-of-output": Case(
        "import sys\nfor _ in range(1024): sys.stdout.write('x' * 2**20)", LIMIT, "wrote more"
    ),
    "1-gb-of-errors": Case(
        "import sys\nfor _ in range(1024): sys.stderr.write('x' * 2**20)", LIMIT, "wrote more"
    ),
    "patient-output": Case(
        """
        import os
        while True:
            try:
                os.write(1, b'x' * 2**20)
            except OSError:
                break
        """,
        LIMIT,
        "wrote more",
    ),
    "huge-file": Case("open('/tmp/a', 'wb').write(bytes(2**26))", LIMIT, "File too large"),
    "sparse-file": Case("open('/tmp/a', 'wb').truncate(2**40)", LIMIT, "File too large"),
    "many-large-files": Case(
        "for i in range(100): open(f'/tmp/{i}', 'wb').write(bytes(2**20))", LIMIT, "No space"
    ),
    "many-small-files": Case(
        "for i in range(10**6): open(f'/tmp/{i}', 'w').close()", LIMIT, "No space"
    ),
    "many-descriptors": Case("x = [open('/dev/null') for _ in range(10**6)]", LIMIT, "Too many"),
    "nested-directories": Case(
        "import os\nwhile True: os.mkdir('d'); os.chdir('d')", LIMIT, "No space"
    ),
    "deep-recursion": Case("import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()", LIMIT),
    "deep-recursion-in-c": Case(
        """
        import gc
        gc.disable()  # else building it takes a second on a slow processor, the limit
        x = ()
        for _ in range(2 * 10**6):
            x = (x,)
        hash(x)
        """,
        LIMIT,
        "Segmentation fault",
    ),
    "segfault": Case("import ctypes; ctypes.string_at(0)", LIMIT, "Segmentation fault"),
    "abort": Case("import os; os.abort()", LIMIT, "signal"),
    "endless-loop": Case("while True: pass", LIMIT, "Killed"),
    "deaf-loop": Case(
        """
        import signal
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        while True: pass
        """,
        LIMIT,
        "Killed",
    ),
    "endless-integer": Case("pow(9, 9**9)", LIMIT, "Killed"),
    "endless-compilation": Case("x = " + "-" * 10**6 + "1", Outcome.UNPARSABLE),
    "raised-limits": Case(
        "import resource as r; r.setrlimit(r.RLIMIT_CPU, (99, 99))", LIMIT, "not allowed"
    ),
    "signals-to-all": Case(
        f"""
        import os, signal
        for pid in (os.getppid(), 1, 2, {os.getpid()}, -1, 0):
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        print({EXPECTED!r})
        """,
        CORRECT,
    ),
    "stopped-itself": Case(
        f"import os, signal; os.kill(os.getpid(), signal.SIGSTOP); print({EXPECTED!r})", CORRECT
    ),
    "changed-input": Case("import os; os.write(0, b'x')", LIMIT, "not permitted"),
    "non-zero-exit": Case(f"print({EXPECTED!r}); raise SystemExit(3)", LIMIT, "exit code 3"),
    "early-exit": Case("import sys; sys.exit(0)\n", WRONG, "printed ''"),
    "hard-exit": Case("import os; os._exit(0)", WRONG, "printed ''"),
    "printed-success": Case("print('OK'); print('1 passed'); print('{\"reward\": 1}')", WRONG),
}


@pytest.mark.parametrize("name", CONTAINED)
def test_contained(sandbox: Sandbox, name: str) -> None:
    check(sandbox, CONTAINED[name], PRINTS)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """Anyone may read and write in it: nothing but the sandbox keeps a program out."""
    with TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


def test_writing_outside_changes_nothing(sandbox: Sandbox, open_directory: Path) -> None:
    kept, new = open_directory / "kept", open_directory / "new"
    kept.write_text("kept")
    kept.chmod(0o666)
    for path in (kept, new, Path.home() / "new", Path("/usr/new")):
        case = Case(f"open({str(path)!r}, 'w').write('x')", LIMIT, "Error")
        check(sandbox, case, PRINTS)
    assert (list(open_directory.iterdir()), kept.read_text()) == ([kept], "kept")
    assert not (Path.home() / "new").exists() and not Path("/usr/new").exists()


def test_a_program_finds_nothing_of_the_one_before(sandbox: Sandbox) -> None:
    leave = "import sys; open('/tmp/left', 'w').write('x'); sys.left = 1"
    assert sandbox.run(Program(source=leave)).failure is None
    look = "import os, sys; print(os.listdir('/tmp'), hasattr(sys, 'left'))"
    assert sandbox.run(Program(source=look)).stdout == b"[] False\n"


DAEMON = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        for fd in range(64):
            try:
                os.close(fd)
            except OSError:
                pass
        time.sleep(600)
    os._exit(0)
os.wait()
print({EXPECTED!r})
"""


def test_a_daemon_dies_with_its_program(forking_sandbox: Sandbox) -> None:
    """Where programs may fork: its PID namespace ends with the first process in it."""
    check(forking_sandbox, Case(DAEMON, CORRECT), PRINTS)


def test_a_daemon_does_not_even_start(sandbox: Sandbox) -> None:
    check(sandbox, Case(DAEMON, LIMIT, "PermissionError"), PRINTS)


@pytest.mark.parametrize(
    "bomb",
    [
        "import os\nwhile True:\n try:\n  os.fork()\n except OSError:\n  pass",
        "import os\nwhile True:\n try:\n  os.fork()\n except OSError:\n  os.wait()",
        "import os, time\nos.fork()\nos.fork()\ntime.sleep(600)",
    ],
    ids=["spinning", "waiting", "sleeping"],
)
def test_a_fork_bomb_that_may_fork(forking_sandbox: Sandbox, bomb: str) -> None:
    check(forking_sandbox, Case(bomb, LIMIT, answer_s=1.0), PRINTS)


def test_processes_that_may_be_started_work(forking_sandbox: Sandbox) -> None:
    program = """
    import subprocess
    print(subprocess.run(['/bin/echo', 'hello'], capture_output=True, text=True).stdout)
    """
    reference = {"cases": [{"input": "", "output": "hello"}]}
    assert score_program(forking_sandbox, program, reference).outcome is CORRECT


def test_a_memory_bomb(patient_sandbox: Sandbox) -> None:
    bomb = "x = []\nwhile True: x.append(bytearray(10**6))"
    check(patient_sandbox, Case(bomb, LIMIT, "MemoryError"), PRINTS)


def test_memory_stays_within_the_limit(patient_sandbox: Sandbox) -> None:
    """As the kernel counted it, not as the program says."""
    hoard = "x = []\ntry:\n    while True: x.append(bytearray(10**6))\nexcept MemoryError: pass\n"
    peak = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    run = patient_sandbox.run(Program(source=hoard + peak))
    assert 100 << 10 < int(run.stdout) <= PATIENT.memory_mb << 10
