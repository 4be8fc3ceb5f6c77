"""Programs that try to get out, to take the machine with them, or to pass without being right.

Each is scored as an answer would be; then nothing of it may be left, and the sandbox must go on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import dedent
from typing import Any, NamedTuple

import pytest
from sandbox_helpers import (
    FORKING,
    INSTALLED,
    QUICK,
    close_all,
    open_or_skip,
    processes_in,
)

from posttrain.data.prompts import make_prompt
from posttrain.types import Outcome
from rewards import code
from rewards.sandbox import Sandbox
from rewards.sandbox_client import Program
from rewards.score import Score

WRONG, LIMIT, CORRECT = Outcome.WRONG, Outcome.LIMIT, Outcome.CORRECT

EXPECTED = "4213-what-no-program-can-know"


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


class Case(NamedTuple):
    program: str
    outcome: Outcome
    explanation: str = ""
    answer_s: float = 60.0


def check(sandbox: Sandbox, case: Case, reference: dict[str, Any]) -> None:
    """Scores the case, then looks whether anything has changed."""
    mounts, before = Path("/proc/self/mounts").read_text(), processes_in(sandbox)
    score = score_program(sandbox, case.program, reference, case.answer_s)
    assert (score.outcome, score.correctness) == (case.outcome, float(case.outcome is CORRECT))
    assert case.explanation in score.explanation
    assert processes_in(sandbox) == before
    assert Path("/proc/self/mounts").read_text() == mounts
    after = sandbox.run(Program(source="import os; print(os.listdir())"))
    assert (after.failure, after.stdout) == (None, b"[]\n")
    assert processes_in(sandbox) == before  # and it is the same zygote


def score_program(
    sandbox: Sandbox, program: str, reference: dict[str, Any], answer_s: float = 60.0
) -> Score:
    prompt = make_prompt("?", reference=reference, domain="programs")
    code.check_reference(prompt)
    text = f"```python\n{dedent(program)}\n```"
    return code.score_with(sandbox.run, prompt, text, code.CodeSettings(answer_s=answer_s))


PRINTS = {"cases": [{"input": "", "output": EXPECTED}]}
CALLS = {"function": "f", "cases": [{"args": [1], "expected": EXPECTED}]}

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
    "memory-bomb": Case("x = []\nwhile True: x.append(bytearray(10**6))", LIMIT, "MemoryError"),
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
        x = ()
        for _ in range(3 * 10**6):
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


FORGED = {
    "exit": Case("import sys; sys.exit(0)", WRONG, "before the function returned"),
    "exit-when-called": Case("import os\ndef f(x): os._exit(0)", WRONG, "before the function"),
    "exit-in-thread": Case(
        "import os, threading\nthreading.Thread(target=os._exit, args=(0,)).start()\nf = id", WRONG
    ),
    "always-equal": Case(
        """
        class Always(str):
            def __eq__(self, other): return True
            def __hash__(self): return 0
        def f(x): return Always('x')
        """,
        WRONG,
        "returned '\"x\"'",
    ),
    "an-object": Case("def f(x): return object()", LIMIT, "cannot be compared"),
    "patched-builtins": Case(
        """
        import builtins
        for name in ('all', 'any', 'len', 'map', 'print', 'sorted'):
            setattr(builtins, name, lambda *a, **k: True)
        def f(x): return 'x'
        """,
        WRONG,
    ),
    "patched-json": Case(
        """
        import json
        json.dumps = json.loads = lambda *a, **k: 'true'
        json.JSONEncoder.encode = lambda *a: 'true'
        def f(x): return 'x'
        """,
        WRONG,
    ),
    "patched-unittest": Case(
        """
        import sys, types, unittest
        unittest.TestCase.assertEqual = lambda *a: None
        unittest.TestResult.wasSuccessful = lambda self: True
        sys.modules['unittest'] = sys.modules['pytest'] = types.ModuleType('unittest')
        def f(x): return 'x'
        """,
        WRONG,
    ),
    "patched-harness": Case(
        """
        import sys
        harness = sys.modules['rewards.sandbox_program']
        harness._write = lambda fd, data: None
        harness.json = harness._find = None
        for name in list(sys.modules): del sys.modules[name]
        def f(x): return 'x'
        """,
        LIMIT,
    ),
    "at-exit": Case(
        "import atexit, os\natexit.register(os.write, 3, b'true')\ndef f(x): return 'x'",
        WRONG,
        "cannot be read",
    ),
    "wrote-the-result": Case(
        "import os\nos.write(3, b'{\"passed\": true}'); os._exit(0)\nf = id", WRONG, "passed"
    ),
    "wrote-rubbish": Case("import os\nos.write(3, b'\\xff[' * 999); os._exit(0)", WRONG, "cannot"),
    "nested-result": Case("import os\nos.write(3, b'[' * 10**6); os._exit(0)", WRONG, "cannot"),
    "endless-result": Case("import os\nwhile True: os.write(3, b'1' * 2**20)", LIMIT, "wrote more"),
    "closed-the-result": Case(
        "import os\nos.closerange(0, 64)\ndef f(x): return 'x'", LIMIT, "exit code 1"
    ),
    "swapped-the-result": Case(
        "import os\nos.dup2(1, 3)\ndef f(x): return 'x'", WRONG, "before the function returned"
    ),
    "rewound-the-result": Case(
        """
        import os
        keep = os.dup(3)
        os.ftruncate(keep, 0)
        def f(x): return 'x'
        """,
        WRONG,
    ),
    "searched-the-frames": Case(
        """
        import gc, sys
        def f(x):
            found, frame = [], sys._getframe()
            while frame:
                found += [frame.f_locals, frame.f_globals]
                frame = frame.f_back
            for thing in found + gc.get_objects():
                if isinstance(thing, dict):
                    for key, value in list(thing.items()):
                        if key == 'expected' or isinstance(value, str) and value[:5] == '4213-':
                            return value
        """,
        WRONG,
        "returned 'null'",
    ),
    "searched-the-files": Case(
        """
        import os, sys
        python = os.path.realpath(sys.base_prefix)
        def f(x):
            for top in ('/tmp', '/dev', '/proc', '/home', '/var', '/etc', '/old'):
                for directory, below, files in os.walk(top):
                    below[:] = [n for n in below if os.path.join(directory, n) != python]
                    for name in files:
                        path = os.path.join(directory, name)
                        if os.path.isfile(path) and b'4213-' in open(path, 'rb').read():
                            return path
            for fd in range(64):
                try:
                    if b'4213-' in os.pread(fd, 10**6, 0):
                        return str(fd)
                except OSError:
                    pass
        """,
        WRONG,
        "returned 'null'",
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_pass_cannot_be_forged(sandbox: Sandbox, name: str) -> None:
    check(sandbox, FORGED[name], CALLS)


def test_what_is_expected_is_never_sent(sandbox: Sandbox) -> None:
    """The search above finds its own input, so it would have found more."""
    program = dedent(FORGED["searched-the-frames"].program).replace("4213-", "seek-")
    run = sandbox.run(Program(source=program, function="f", arguments=("seek-me",)))
    assert run.result == b'"seek-me"'


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


def test_memory_stays_within_the_limit(sandbox: Sandbox) -> None:
    """As the kernel counted it, not as the program says."""
    hoard = "x = []\ntry:\n    while True: x.append(bytearray(10**6))\nexcept MemoryError: pass\n"
    peak = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    run = sandbox.run(Program(source=hoard + peak))
    assert 100 << 10 < int(run.stdout) <= QUICK.memory_mb << 10
