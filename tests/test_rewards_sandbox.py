"""How programs run, what the sandbox reports, and what happens where there is none."""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from sandbox_helpers import (
    ABSENT,
    FORBIDDEN,
    INSTALLED,
    LEAKY,
    MISSING,
    QUICK,
    SILENT,
    close_all,
    open_or_skip,
)

from posttrain import doctor
from posttrain.errors import SandboxError
from rewards.sandbox import Sandbox
from rewards.sandbox_client import Program
from rewards.sandbox_launcher import OWN, SandboxSettings, system_paths
from rewards.sandbox_probe import judge
from rewards.worker_template import MEMORY_LIMIT

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def _closed_at_the_end() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture(params=INSTALLED)
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return open_or_skip(request.param)


def call(sandbox: Sandbox, source: str, function: str, *arguments: Any) -> Any:
    run = sandbox.run(Program(source=source, function=function, arguments=arguments))
    assert run.failure is None
    return json.loads(run.result)


def test_stdin_and_stdout(sandbox: Sandbox) -> None:
    source = "import sys\nprint(input() + '|' + sys.stdin.read(), end='', file=sys.stdout)"
    run = sandbox.run(Program(source=source, stdin="é\n🙂\n"))
    assert (run.stdout.decode(), run.stderr, run.result) == ("é|🙂\n", b"", b"")
    assert (run.exit_code, run.timed_out, run.file_full, run.failure) == (0, False, False, None)
    assert 0 < run.cpu_s < 1


@pytest.mark.parametrize(
    ("source", "stdin", "stdout"),
    [
        ("if __name__ == '__main__': print(1)", "", "1\n"),
        ("print(open(0).read())", "x", "x\n"),
        ("import sys; print(sys.stdin.buffer.readline())", "a\nb", "b'a\\n'\n"),
        ("import os; print(os.read(0, 9))", "abc", "b'abc'\n"),
        ("print(1); exit()", "", "1\n"),
        ("print(1, end=''); raise SystemExit", "", "1"),
        ("import atexit; atexit.register(print, 'late'); print('early')", "", "early\nlate\n"),
        ("import sys; sys.stdout.write('no newline')", "", "no newline"),
        ("import threading as t; t.Thread(target=print, args=(1,)).start()", "", "1\n"),
        (
            "import sys; sys.setrecursionlimit(9999)\nf=lambda n: n and f(n-1)\nprint(f(9000))",
            "",
            "0\n",
        ),
        (
            "import threading as t; t.stack_size(2**26); x=t.Thread(target=print); x.start()",
            "",
            "\n",
        ),
        ("import resource as r; r.setrlimit(r.RLIMIT_STACK, (2**28, -1)); print(1)", "", "1\n"),
        ("open('a', 'w').write('x'); print(open('/tmp/a').read())", "", "x\n"),
        ("from multiprocessing import Lock; Lock(); print(1)", "", "1\n"),
        ("print(hash('a') == hash('a'), {'b', 'a', 'c'} == {*'abc'})", "", "True True\n"),
        ("import sys; print(sys.argv, __name__)", "", "['answer.py'] __main__\n"),
        ("import tempfile; print(tempfile.TemporaryFile().read())", "", "b''\n"),
    ],
)
def test_ordinary_programs(sandbox: Sandbox, source: str, stdin: str, stdout: str) -> None:
    run = sandbox.run(Program(source=source, stdin=stdin))
    assert (run.stdout.decode(), run.failure) == (stdout, None)


def test_calls(sandbox: Sandbox) -> None:
    assert call(sandbox, "def f(a, b): return a + b", "f", [1], [2.5, None, "x"]) == [
        *(1, 2.5, None, "x")
    ]
    method = (
        "class Solution:\n    def __init__(self): self.n = 1\n    def f(self, x): return x + self.n"
    )
    assert call(sandbox, method, "Solution.f", 4) == 5
    assert call(sandbox, "def f(): return (1, {'a': {3, 1, 2}})", "f") == [1, {"a": [1, 2, 3]}]
    assert call(sandbox, "def f(x):\n    print('noise')\n    return 2 ** 200", "f", 0) == 2**200
    guarded = "def f(): return 1\nif __name__ == '__main__': raise SystemExit(5)"
    assert call(sandbox, guarded, "f") == 1


@pytest.mark.parametrize(
    "source",
    ["def f(:", "x = '\0'", "x = '\ud800", "return 1", "(" * 10_000, "x = " + "9" * 10_000],
)
def test_what_does_not_compile(sandbox: Sandbox, source: str) -> None:
    assert not sandbox.run(Program(source=source)).compiled


def test_how_failures_are_told(sandbox: Sandbox) -> None:
    def failure(source: str, wall_s: float | None = None) -> str | None:
        return sandbox.run(Program(source=source), wall_s).failure

    assert failure("1 / 0") == "exit code 1: ZeroDivisionError: division by zero"
    assert failure("raise SystemExit('no way')") == "exit code 1: no way"
    assert failure("raise SystemExit('\\x1b[2J\\a')") == "exit code 1: ?[2J?"
    assert failure("import os; os._exit(9)") == "exit code 9: without a word"
    assert "Killed" in str(failure("while True: pass"))
    assert "still ran after 0." in str(failure("import time; time.sleep(60)", wall_s=0.3))
    assert failure("def f(x): pass") is None


def test_sets_come_in_the_same_order_every_time() -> None:
    """A program whose output depends on it scores the same in every process."""
    source = "print([*{str(n) for n in range(20)}])"
    outputs = set()
    for _ in range(2):
        open_or_skip("own")
        with Sandbox(QUICK, launchers=[OWN]) as sandbox:
            outputs.add(sandbox.run(Program(source=source)).stdout)
    assert len(outputs) == 1


def test_programs_in_many_threads(sandbox: Sandbox) -> None:
    results: dict[int, bytes] = {}

    def work(number: int) -> None:
        run = sandbox.run(Program(source="print(input())", stdin=str(number)))
        results[number] = run.stdout

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: f"{number}\n".encode() for number in range(12)}


SYSTEM_CALL = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def f(*arguments): return libc.syscall(*arguments), ctypes.get_errno()
"""
EPERM, EAFNOSUPPORT, ENOSYS = 1, 97, 38


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of system calls for x86-64")
@pytest.mark.parametrize(
    ("number", "arguments", "error"),
    [
        (272, [0x10000000], EPERM),  # unshare: a user namespace
        (56, [0x10000011, 0, 0, 0, 0], EPERM),  # clone with the same flag
        (435, [0, 0], ENOSYS),  # clone3
        (57, [], EPERM),  # fork
        (101, [0, 0, 0, 0], EPERM),  # ptrace
        (319, [0, 0], EPERM),  # memfd_create
        (29, [0, 1 << 30, 0o1600], EPERM),  # shmget
        (41, [2, 1, 0], EAFNOSUPPORT),  # socket: IPv4
        (41, [40, 1, 0], EAFNOSUPPORT),  # and to the hypervisor
        (425, [1, 0], EPERM),  # io_uring_setup
        (321, [0, 0, 0], EPERM),  # bpf
        (250, [0, 0], EPERM),  # keyctl
        (600, [], ENOSYS),  # of a later kernel
        (0x40000000 + 57, [], ENOSYS),  # fork by its number for 32-bit pointers
    ],
)
def test_system_calls_that_are_refused(
    sandbox: Sandbox, number: int, arguments: list[int], error: int
) -> None:
    assert call(sandbox, SYSTEM_CALL, "f", number, *arguments) == [-1, error]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="machine code for x86-64")
def test_calls_of_another_architecture_are_deadly(sandbox: Sandbox) -> None:
    """Their numbers mean other things: on i386, 2 is fork."""
    source = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(b'\\xb8\\x02\\x00\\x00\\x00\\xcd\\x80\\xc3')  # mov eax, 2; int 0x80; ret
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))())
"""
    run = sandbox.run(Program(source=source))
    assert (run.exit_code, run.stdout) == (-signal.SIGSYS, b"")


def test_installed_modules_only_when_asked_for() -> None:
    open_or_skip("own")
    source = "import numpy\ndef f(x): return numpy.arange(x) * numpy.float32(2)"
    program = Program(source=source, function="f", arguments=(3,))
    with Sandbox(QUICK, launchers=[OWN]) as bare:
        assert "No module named 'numpy'" in str(bare.run(program).failure)
    with open_or_skip("own", SandboxSettings(modules=("numpy",))) as sandbox:
        assert json.loads(sandbox.run(program).result) == [0, 2, 4]
        assert all(attempt.contained for attempt in sandbox.attempts)
    with pytest.raises(SandboxError, match="No module named 'no_such_module'"):
        Sandbox(SandboxSettings(modules=("no_such_module",)), launchers=[OWN])


def test_modules_where_programs_have_their_scratch_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = dict.fromkeys(("purelib", "platlib"), "/tmp/clone/site-packages")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: places)
    with pytest.raises(SandboxError, match="installed in /tmp/clone/site-packages, but programs"):
        Sandbox(SandboxSettings(modules=("numpy",)), launchers=[OWN])


def test_only_the_system_and_python_can_be_seen() -> None:
    paths = system_paths(SandboxSettings())
    assert "/usr" in paths
    assert any(os.path.realpath(sys.base_prefix).startswith(path) for path in paths)
    for private in (Path.home(), Path("/etc"), Path("/var"), Path("/"), ROOT):
        assert str(private) not in paths


# What the sandbox says of itself, and where there is none.


def test_the_probe_tried_everything_and_found_nothing(sandbox: Sandbox) -> None:
    assert len(sandbox.attempts) >= 20
    assert all(attempt.contained for attempt in sandbox.attempts)
    details = {attempt.name: attempt.detail for attempt in sandbox.attempts}
    assert "Connection refused" in details["connect to a local socket"]
    assert "No such file" in details["read a file in the home directory"]
    assert details["exhaust memory"].startswith("MemoryError")


def test_an_escape_is_recognised() -> None:
    held, out = judge({"a": "found nothing", "b": "ESCAPED: it"})
    assert (held.contained, out.contained, out.name) == (True, False, "b")


def test_without_a_launcher_nothing_runs() -> None:
    with pytest.raises(SandboxError) as caught:
        Sandbox(QUICK, launchers=[ABSENT, FORBIDDEN, SILENT, MISSING])
    message = str(caught.value)
    for reason in (
        "absent: not installed",
        "forbidden: unshare: not permitted",
        "silent: exit code 7, without a word",
        "missing: [Errno 2] No such file",
        "Install bubblewrap",
        "unsafe: true",
    ):
        assert reason in message
    assert caught.value.exit_code == 2


FORBIDDING = """
from rewards.sandbox import Sandbox, SandboxError
from rewards.sandbox_launcher import OWN, SandboxSettings
from rewards.sandbox_syscalls import Filter, drop_capabilities
drop_capabilities()
Filter(may_fork=True).install()
try:
    Sandbox(SandboxSettings(), launchers=[OWN])
except SandboxError as error:
    print(error)
"""


def test_where_the_kernel_refuses_namespaces_nothing_runs() -> None:
    """As in a container: here it is our own filter that refuses them."""
    done = subprocess.run(
        [sys.executable, "-c", FORBIDDING],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "own launcher: PermissionError: [Errno 1] unshare(" in done.stdout


def test_a_launcher_that_does_not_hold_is_refused() -> None:
    with pytest.raises(SandboxError, match="leaky does not hold") as caught:
        Sandbox(QUICK, launchers=[LEAKY])
    for escape in (
        "connect to a local socket (ESCAPED",
        "read a file in the home directory (ESCAPED: a secret)",
        "read the accounts",
        "write outside",
        "see other processes",
        "fill the disk",
    ):
        assert escape in str(caught.value)


def test_the_next_launcher_takes_over() -> None:
    open_or_skip("own")
    with Sandbox(QUICK, launchers=[ABSENT, LEAKY, OWN]) as sandbox:
        assert sandbox.launcher is OWN
        absent, leaky = sandbox.refused
        assert absent == "absent: not installed" and leaky.startswith("leaky does not hold")


def test_unsafe_is_loud_and_only_a_last_resort(caplog: pytest.LogCaptureFixture) -> None:
    unsafe = QUICK.model_copy(update={"unsafe": True})
    with (
        caplog.at_level(logging.ERROR),
        pytest.warns(RuntimeWarning, match="WITHOUT a sandbox, with every right"),
        Sandbox(unsafe, launchers=[FORBIDDEN]) as sandbox,
    ):
        assert not sandbox.launcher.isolates
        assert "UNSAFE" in caplog.text and "unshare: not permitted" in caplog.text
        run = sandbox.run(Program(source="import os; print(os.path.exists('/etc/passwd'))"))
        assert (run.stdout, run.failure) == (b"True\n", None)
        # Limits hold all the same.
        assert "MemoryError" in str(sandbox.run(Program(source="bytearray(2**30)")).failure)
        assert sandbox.run(Program(source="import time; time.sleep(9)"), wall_s=0.2).timed_out
    open_or_skip("own")
    with Sandbox(unsafe, launchers=[OWN]) as sandbox:  # warns of nothing
        assert sandbox.launcher is OWN


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(settings: SandboxSettings) -> Sandbox:
        return Sandbox(settings, launchers=[FORBIDDEN])

    monkeypatch.setattr(doctor, "Sandbox", refuse)
    finding = doctor.examine_sandbox()
    assert finding.works is None and "unshare: not permitted" in finding.detail
    open_or_skip("own")
    monkeypatch.setattr(doctor, "Sandbox", lambda s: Sandbox(s, launchers=[ABSENT, OWN]))
    assert doctor.examine_sandbox() == doctor.Finding(
        "sandbox",
        True,
        "own launcher; 20 attempts to get out, all failed; absent: not installed",
    )


def test_no_more_memory_than_scorer_processes_have() -> None:
    """Their limit holds for the programs of their sandbox too, whatever the settings promise."""
    assert SandboxSettings(memory_mb=MEMORY_LIMIT >> 20).memory_mb == 4096
    with pytest.raises(ValidationError, match=r"memory_mb\n.*less than or equal to 4096"):
        SandboxSettings(memory_mb=4097)
