"""The outside end of one zygote: a program goes in, how it ended comes out."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from typing import IO, Any

from rewards.sandbox_launcher import Launcher, SandboxSettings
from rewards.sandbox_program import NOT_PYTHON
from rewards.sandbox_zygote import FILES, REQUEST

START_DEADLINE_S = 60.0
GRACE_S = 5.0
"""How much longer than the program's own deadline the zygote may take to answer."""

LEAST_CPU_LIMIT_S = 0.25
"""A program in a PID namespace cannot kill itself but by its limit of CPU time, which is a second
at least. One that was killed, not by us, with less than this was killed from outside."""

_OUTPUTS = ("stdout", "stderr", "result")


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
    def last_words(self) -> str:
        """The last line on stderr: of an uncaught exception, its name and message. Nothing that
        could steer a terminal is left in it."""
        lines = self.stderr[-2000:].decode(errors="replace").strip().splitlines()
        shown = lines[-1][:200] if lines else "without a word"
        return "".join(c if c.isprintable() else "?" for c in shown)

    @property
    def failure(self) -> str | None:
        """Why the run counts for nothing: it did not come to its end, or broke a limit."""
        if self.timed_out:
            return f"still ran after {self.wall_s:.1f} s"
        if self.file_full:
            return "wrote more than it may"
        if self.exit_code < 0:
            name = signal.strsignal(-self.exit_code)
            return f"ended by a signal ({name}) after {self.cpu_s:.1f} s of CPU"
        if self.exit_code > 0:
            return f"exit code {self.exit_code}: {self.last_words}"
        return None


class ZygoteDied(Exception):
    """It could not start, ended, or fell silent; the program is not known to be at fault."""


class ZygoteClient:
    """Owns the zygote's process (or its keeper's) and the control socket. Not thread-safe."""

    def __init__(self, launcher: Launcher, settings: SandboxSettings) -> None:
        """Raises Unavailable, or ZygoteDied with what it said when it could not start."""
        self._isolates = launcher.isolates
        self._file_limit = settings.file_mb << 20
        self._control, theirs = socket.socketpair()
        self._messages: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process: subprocess.Popen[bytes] | None = None
        try:
            with theirs:
                self._process = self._start(launcher, settings, theirs.fileno())
            self._receive(START_DEADLINE_S)
        except BaseException:
            self.close()
            raise

    def _start(
        self, launcher: Launcher, settings: SandboxSettings, control_fd: int
    ) -> subprocess.Popen[bytes]:
        command = launcher.command(settings, control_fd)
        user: dict[str, Any] = {}
        if command.user is not None:
            user = {"user": command.user, "group": command.user, "extra_groups": []}
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
                **user,
            )
        except OSError as error:
            raise ZygoteDied(str(error)) from error

    @property
    def pid(self) -> int:
        """Of the process that was started: the zygote or its keeper."""
        assert self._process is not None
        return self._process.pid

    def run(self, program: Program, wall_s: float) -> Execution:
        """Raises ZygoteDied, also when somebody else has killed the program."""
        files = _Files.open(program, self._file_limit)
        try:
            reply = self._ask(wall_s, [files.fds[name] for name in FILES])
            killed = reply["status"] == -signal.SIGKILL and not reply["timed_out"]
            if killed and self._isolates and reply["cpu_s"] < LEAST_CPU_LIMIT_S:
                raise ZygoteDied("the kernel, or somebody else, has killed the program")
            return Execution(
                exit_code=reply["status"],
                timed_out=reply["timed_out"],
                wall_s=reply["wall_s"],
                cpu_s=reply["cpu_s"],
                file_full=any(files.is_full(name) for name in _OUTPUTS),
                **{name: files.read(name) for name in _OUTPUTS},
            )
        finally:
            files.close()

    def _ask(self, wall_s: float, fds: list[int]) -> Any:
        try:
            socket.send_fds(self._control, [REQUEST.pack(wall_s)], fds)
        except OSError as error:
            raise ZygoteDied(self._last_words()) from error
        return self._receive(wall_s + GRACE_S)

    def _receive(self, deadline_s: float) -> Any:
        """One message: they are short, are sent in one piece, and never follow one another."""
        self._control.settimeout(deadline_s)
        try:
            message = self._control.recv(65536)
        except TimeoutError as error:
            raise ZygoteDied(f"no answer within {deadline_s:g} s") from error
        except OSError as error:
            raise ZygoteDied(self._last_words()) from error
        if not message:
            raise ZygoteDied(self._last_words())
        return json.loads(message)

    def _last_words(self) -> str:
        """The end of what the process wrote to stderr, once it has ended."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        self._messages.seek(0)
        lines = self._messages.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.poll()}, without a word"

    def close(self) -> None:
        """The zygote ends when its socket closes, and it is killed when its keeper ends."""
        self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._messages.close()


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
        """For good: nobody can write it again."""
        fd = self.fds[name]
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(data)
        os.lseek(fd, 0, os.SEEK_SET)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)

    def read(self, name: str) -> bytes:
        fd = self.fds[name]
        return os.pread(fd, min(os.fstat(fd).st_size, self.limit), 0)

    def is_full(self, name: str) -> bool:
        return os.fstat(self.fds[name]).st_size >= self.limit

    def close(self) -> None:
        for fd in self.fds.values():
            os.close(fd)
