"""The process inside the sandbox that forks one process for each program it is asked to run.

A fork costs a fraction of what starting Python costs. Each program gets a PID namespace and an
empty scratch directory of its own and none of the zygote's rights or descriptors; when its first
process ends or is killed, the kernel ends everything else in that namespace before the zygote hears
of it. The zygote never sees a program nor what it writes: those are files that the other side has
opened, and the fork reads the one, the other side the rest. So no program finds traces of another.

Imported inside the sandbox: the standard library only, nothing of ours but `sandbox_syscalls`.
A request on the control socket is `REQUEST` with the files; a reply is one JSON object.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import os
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from typing import Any, NoReturn

from rewards import sandbox_program
from rewards.sandbox_syscalls import (
    CLONE_NEWPID,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    Filter,
    die_with_parent,
    drop_capabilities,
    mount,
    setns,
    unmount,
    unshare,
)

SCRATCH = "/tmp"
"""The only place where a program can write."""

REQUEST = struct.Struct("!d")
"""Seconds of wall-clock for one program."""

FILES = ("stdin", "stdout", "stderr", "result", "job")
"""Descriptors that come with a request; `job` is what `sandbox_program.run` takes, in JSON."""

_SCRATCH_FILES = 1024
_OPEN_FILES = 64
_THREADS = 64
_STACK_BYTES = 64 << 20
_OWN_PROCESSES = 2
"""Those of ours that may count against the program's limit, when they run as the same user."""


def main(config: dict[str, Any]) -> None:
    """Serves until the control socket closes. `config` is `sandbox_launcher.zygote_config`'s."""
    # Ours when nobody reads the socket any more, also while a program runs.
    die_with_parent(signal.SIGKILL)
    control = socket.socket(fileno=config["control_fd"])
    zygote = _Zygote(control, config)
    zygote.load([*sandbox_program.PRELOADED, *config["modules"]], config["module_paths"])
    zygote.serve()


class _Zygote:
    def __init__(self, control: socket.socket, config: dict[str, Any]) -> None:
        self._control = control
        self._isolated: bool = config["isolated"]
        self._user: int | None = config["user"]
        self._limits = _resource_limits(config)
        self._scratch_options = (
            f"size={config['scratch_bytes']},nr_inodes={_SCRATCH_FILES},mode=700"
        )
        if self._user is not None:
            self._scratch_options += f",uid={self._user},gid={self._user}"
        self._filter = Filter(may_fork=config["processes"] > 1)
        if self._isolated:
            self._pid_namespace = _open_pid_namespace(config["pid_namespace_fd"])

    def load(self, modules: list[str], paths: list[str]) -> None:
        """Imports what every program inherits. Some packages write while they are imported."""
        scratch = self._make_scratch()
        sys.path.extend(paths)
        for name in modules:
            importlib.import_module(name)
        self._remove_scratch(scratch)
        os.environ.clear()
        gc.collect()
        gc.freeze()  # what is here now is shared with every program and never collected

    def serve(self) -> None:
        self._send({"ready": True})
        while True:
            request, files, _, _ = socket.recv_fds(self._control, REQUEST.size, len(FILES))
            if not request:
                return
            self._send(self._run(REQUEST.unpack(request)[0], files))

    def _send(self, message: dict[str, Any]) -> None:
        self._control.sendall(json.dumps(message).encode())

    def _run(self, wall_s: float, files: list[int]) -> dict[str, Any]:
        scratch = self._make_scratch()
        started = time.monotonic()
        pid = self._fork()
        if pid == 0:
            self._become_program(files, scratch)
        for file in files:
            os.close(file)
        timed_out = not self._wait(pid, started + wall_s)
        if not self._isolated:  # no namespace takes along what it left behind
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        self._remove_scratch(scratch)
        return {
            "status": os.waitstatus_to_exitcode(status),
            "timed_out": timed_out,
            "wall_s": time.monotonic() - started,
            "cpu_s": usage.ru_utime + usage.ru_stime,
        }

    def _make_scratch(self) -> str:
        if not self._isolated:
            return tempfile.mkdtemp(prefix="unsafe-sandbox-")
        flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
        mount("scratch", SCRATCH, "tmpfs", flags, self._scratch_options)
        return SCRATCH

    def _remove_scratch(self, scratch: str) -> None:
        if self._isolated:
            unmount(scratch)
        else:
            shutil.rmtree(scratch, ignore_errors=True)

    def _fork(self) -> int:
        """The child is the first process of a PID namespace of its own."""
        if not self._isolated:
            return os.fork()
        unshare(CLONE_NEWPID)
        pid = os.fork()
        if pid:
            setns(self._pid_namespace, CLONE_NEWPID)
        return pid

    def _wait(self, pid: int, deadline: float) -> bool:
        """False when the program was still running at the deadline. It is dead afterwards."""
        program = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(program, select.POLLIN)
            poll.register(self._control, select.POLLIN)
            left_ms = max(0, math.ceil((deadline - time.monotonic()) * 1000))
            ready = [fd for fd, _ in poll.poll(left_ms)]
            if program in ready:
                return True
            signal.pidfd_send_signal(program, signal.SIGKILL)
            if ready:  # no second job comes before the answer: the other side is gone
                sys.exit(0)
            return False
        finally:
            os.close(program)

    def _become_program(self, files: list[int], scratch: str) -> NoReturn:
        os.setsid()  # signals to the process group stay within
        with os.fdopen(files.pop(), "rb") as file:
            job = json.load(file)
        for number, file_to_keep in enumerate(files):
            os.dup2(file_to_keep, number)
        os.closerange(len(files), os.sysconf("SC_OPEN_MAX"))
        if self._user is not None:
            os.setgroups([])
            os.setresgid(self._user, self._user, self._user)
            os.setresuid(self._user, self._user, self._user)
        for kind, limits in self._limits.items():
            resource.setrlimit(kind, limits)
        os.chdir(scratch)
        drop_capabilities()
        die_with_parent(signal.SIGKILL)
        self._filter.install()
        sandbox_program.run(job, result_fd=FILES.index("result"))


def _resource_limits(config: dict[str, Any]) -> dict[int, tuple[int, int]]:
    """Soft and hard, by kind of resource."""
    processes: int = config["processes"]
    wanted = {
        resource.RLIMIT_AS: config["memory_bytes"],
        resource.RLIMIT_FSIZE: config["file_bytes"],
        resource.RLIMIT_CPU: config["cpu_s"],
        # A program that may not fork may have threads; else every thread counts as a process.
        resource.RLIMIT_NPROC: _OWN_PROCESSES + (processes if processes > 1 else _THREADS),
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }

    def allowed(kind: int, limit: int) -> int:
        _, hard = resource.getrlimit(kind)
        return limit if hard == resource.RLIM_INFINITY else min(limit, hard)

    limits = {kind: (allowed(kind, limit),) * 2 for kind, limit in wanted.items()}
    # Deeply recursive programs ask for more stack; the limit of memory bounds it.
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    limits[resource.RLIMIT_STACK] = (allowed(resource.RLIMIT_STACK, _STACK_BYTES), hard)
    return limits


def _open_pid_namespace(inherited: int | None) -> int:
    """A handle on our own PID namespace, to come back to it after each fork. Without an inherited
    one it is taken from /proc, which then goes: a program has no business there."""
    if inherited is not None:
        return inherited
    handle = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    unmount("/proc")
    return handle
