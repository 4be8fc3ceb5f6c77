"""Runs Python programs that nobody has vouched for, one process each, and says how they ended.

    with Sandbox(SandboxSettings()) as sandbox:
        sandbox.run(Program(source="print(input())", stdin="5")).stdout   # b"5\\n"

What a program should have written never enters the sandbox: it writes, the caller compares. So the
worst that it can do to its own score is to be wrong.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import logging
import os
import select
import signal
import socket
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import IO, Any, Self

from posttrain.errors import SandboxError
from rewards.sandbox_launcher import (
    BUBBLEWRAP,
    OWN,
    UNSAFE,
    Launcher,
    SandboxSettings,
    Unavailable,
)
from rewards.sandbox_probe import PROBE, Attempt, judge, targets
from rewards.sandbox_program import NOT_PYTHON
from rewards.sandbox_zygote import FILES, REQUEST

START_DEADLINE_S = 60.0
GRACE_S = 10.0
"""How much longer than the program's own deadline the zygote may take to answer."""

RETRIES = 1
"""Times that a program is run again after the zygote died or fell silent over it."""

OUTPUTS = ("stdout", "stderr", "result")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Python source. With `function` (`f` or `Class.f`), that function is called with `arguments`
    (JSON values) once the source has been executed, and what it returns is the result."""

    source: str
    stdin: str = ""
    function: str | None = None
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How one run ended. `exit_code` is negative for the signal that ended it; `result` is what the
    function returned, as JSON, and empty if it never returned. None of it can be trusted further
    than the program can."""

    exit_code: int
    timed_out: bool
    file_full: bool
    wall_s: float
    cpu_s: float
    stdout: bytes
    stderr: bytes
    result: bytes

    @property
    def compiled(self) -> bool:
        return self.exit_code != NOT_PYTHON

    @property
    def failure(self) -> str | None:
        """Why the run counts for nothing: it did not come to its end, or broke a limit."""
        if self.timed_out:
            return f"still ran after {self.wall_s:.1f} s"
        if self.file_full:
            return "wrote more than it may"
        if self.exit_code < 0:
            return f"ended by {_signal_name(-self.exit_code)} after {self.cpu_s:.1f} s of CPU"
        if self.exit_code > 0:
            lines = self.stderr.decode(errors="replace").strip().splitlines()
            return f"exit code {self.exit_code}" + (f": {lines[-1][:200]}" if lines else "")
        return None


class _ZygoteDied(Exception):
    pass


class Sandbox:
    """A zygote in the first launcher that holds (`rewards.sandbox_zygote`), usable from any thread,
    one program at a time.

    Raises SandboxError at the start, with what each launcher lacks, unless one of them contains
    every attempt of the probe or `settings.unsafe` allows to do without.
    """

    def __init__(
        self, settings: SandboxSettings, launchers: Sequence[Launcher] = (BUBBLEWRAP, OWN)
    ) -> None:
        self._settings = settings
        self._launchers = (*launchers, UNSAFE) if settings.unsafe else tuple(launchers)
        self._lock = threading.Lock()
        self._zygote, self.attempts = _first_that_holds(settings, self._launchers)

    @property
    def launcher(self) -> Launcher:
        return self._zygote.launcher

    def run(self, program: Program, wall_s: float | None = None) -> Execution:
        """`wall_s` shortens the settings' own deadline. Raises SandboxError when the sandbox itself
        fails, twice: then nothing is known about the program."""
        deadline_s = min(self._settings.wall_s, wall_s or self._settings.wall_s)
        with self._lock:
            for _ in range(1 + RETRIES):
                try:
                    return self._zygote.run(program, deadline_s)
                except _ZygoteDied as error:
                    why = error
                    self._zygote.close()
                    self._zygote, self.attempts = _first_that_holds(self._settings, self._launchers)
        raise SandboxError(
            f"the sandbox ({self.launcher.name}) died {1 + RETRIES} times over one program: {why}; "
            "is the machine out of memory?"
        )

    def close(self) -> None:
        """Ends the zygote and all that it started."""
        with self._lock:
            self._zygote.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@lru_cache(maxsize=4)
def shared_sandbox(settings: SandboxSettings) -> Sandbox:
    """This process's sandbox for these settings, started at the first use. Raises SandboxError."""
    sandbox = Sandbox(settings)
    atexit.register(sandbox.close)
    return sandbox


def run_isolated(program: Program, settings: SandboxSettings | None = None) -> Execution:
    """One program in this process's sandbox. Raises SandboxError when there is none."""
    return shared_sandbox(settings or SandboxSettings()).run(program)


def _first_that_holds(
    settings: SandboxSettings, launchers: Sequence[Launcher]
) -> tuple[_Zygote, tuple[Attempt, ...]]:
    reasons = []
    for launcher in launchers:
        try:
            zygote = _Zygote(launcher, settings)
        except (Unavailable, _ZygoteDied) as error:
            reasons.append(f"{launcher.name}: {error}")
            continue
        if not launcher.isolates:
            _warn("; ".join(reasons))
            return zygote, ()
        try:
            attempts = _probe(zygote, settings)
        except _ZygoteDied as error:
            attempts = (Attempt("run at all", contained=False, detail=str(error)),)
        escaped = [
            f"{attempt.name} ({attempt.detail})" for attempt in attempts if not attempt.contained
        ]
        if not escaped:
            return zygote, attempts
        zygote.close()
        reasons.append(f"{launcher.name}: does not hold: {', '.join(escaped)}")
    raise SandboxError(
        f"programs cannot be run safely on this machine ({'; '.join(reasons)}). Install "
        "bubblewrap, allow user namespaces (in a container: run it with them allowed), or, if "
        "nothing on this machine needs protection, set unsafe: true for the sandbox"
    )


def _warn(reasons: str) -> None:
    message = (
        "UNSAFE: programs that the policy writes run WITHOUT a sandbox, with every right of this "
        f"user, because the settings say `unsafe: true` and no sandbox works here ({reasons})"
    )
    _log.error(message)
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _probe(zygote: _Zygote, settings: SandboxSettings) -> tuple[Attempt, ...]:
    with targets(settings) as aims:
        program = Program(source=PROBE, function="attempt", arguments=(aims.as_dict(),))
        execution = zygote.run(program, settings.wall_s)
    if execution.failure is not None:
        raise _ZygoteDied(f"the probe did not finish: {execution.failure}")
    return judge(json.loads(execution.result))


@dataclass
class _Files:
    """What a program reads and writes: files without a name, in memory, opened by us. Nothing has
    to be pumped while it runs, and when it has ended nobody else holds them."""

    limit: int
    fds: dict[str, int]

    @classmethod
    def open(cls, program: Program, limit: int) -> _Files:
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        files = cls(limit, {name: os.memfd_create(name, flags) for name in FILES})
        files._fill("stdin", program.stdin.encode(errors="surrogatepass"))
        job = {
            "source": program.source,
            "function": program.function,
            "arguments": program.arguments,
        }
        files._fill("job", json.dumps(job).encode())
        return files

    def _fill(self, name: str, data: bytes) -> None:
        """For ever: nobody can write it again."""
        fd = self.fds[name]
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(data)
        os.lseek(fd, 0, os.SEEK_SET)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)

    def read(self, name: str) -> bytes:
        fd = self.fds[name]
        return os.pread(fd, min(os.fstat(fd).st_size, self.limit), 0)

    def any_full(self) -> bool:
        return any(os.fstat(self.fds[name]).st_size >= self.limit for name in OUTPUTS)

    def close(self) -> None:
        for fd in self.fds.values():
            os.close(fd)


class _Zygote:
    """The outside end of one zygote: its process, or its keeper's, and the control socket."""

    def __init__(self, launcher: Launcher, settings: SandboxSettings) -> None:
        """Raises Unavailable, or _ZygoteDied with what it said when it could not start."""
        self.launcher = launcher
        self._file_limit = settings.file_mb << 20
        self._control, theirs = socket.socketpair()
        self._messages: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process: subprocess.Popen[bytes] | None = None
        try:
            with theirs:
                self._process = self._start(settings, theirs.fileno())
            self._receive(START_DEADLINE_S)
        except BaseException:
            self.close()
            raise

    def _start(self, settings: SandboxSettings, control_fd: int) -> subprocess.Popen[bytes]:
        command = self.launcher.command(settings, control_fd)
        groups: dict[str, Any] = {}
        if command.user is not None:
            groups = {"user": command.user, "group": command.user, "extra_groups": []}
        try:
            return subprocess.Popen(
                command.arguments,
                pass_fds=[control_fd],
                env=dict(command.environment),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._messages,
                start_new_session=True,
                **groups,
            )
        except OSError as error:
            raise _ZygoteDied(str(error)) from error

    def run(self, program: Program, wall_s: float) -> Execution:
        files = _Files.open(program, self._file_limit)
        try:
            fds = [files.fds[name] for name in FILES]
            try:
                socket.send_fds(self._control, [REQUEST.pack(wall_s)], fds)
            except OSError as error:
                raise _ZygoteDied(self._last_words()) from error
            reply = self._receive(wall_s + GRACE_S)
            return Execution(
                exit_code=reply["status"],
                timed_out=reply["timed_out"],
                file_full=files.any_full(),
                wall_s=reply["wall_s"],
                cpu_s=reply["cpu_s"],
                stdout=files.read("stdout"),
                stderr=files.read("stderr"),
                result=files.read("result"),
            )
        finally:
            files.close()

    def _receive(self, deadline_s: float) -> Any:
        """The zygote's messages are short and sent in one piece."""
        if not select.select([self._control], [], [], deadline_s)[0]:
            raise _ZygoteDied(f"no answer within {deadline_s:g} s")
        try:
            data = self._control.recv(65536)
        except OSError as error:
            raise _ZygoteDied(self._last_words()) from error
        if not data:
            raise _ZygoteDied(self._last_words())
        return json.loads(data)

    def _last_words(self) -> str:
        """The end of what the process wrote to stderr, once it has ended."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        self._messages.seek(0)
        lines = self._messages.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.poll()}, without a word"

    def close(self) -> None:
        """The zygote ends when its socket closes; its keeper's death would end it, too."""
        self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._messages.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
