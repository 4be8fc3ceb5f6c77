"""Attempts to get out of the sandbox, run in it at every start. All of them are meant to fail.

`attempt(targets)` returns, for each attempt, what stopped it, or `ESCAPED` and what it got hold of.
This file's text is sent into the sandbox as the program: the standard library only.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

ESCAPED = "ESCAPED: "
_AF_VSOCK = 40
_NEW_USER_NAMESPACE = 0x10000000


def attempt(targets: dict[str, Any]) -> dict[str, str]:
    """`targets` is `sandbox_probe.Targets.as_dict()`. Attempts are named by their methods."""
    escapes = _Escapes(targets)
    names = [name for name in vars(_Escapes) if not name.startswith("_")]
    return {name.replace("_", " "): _outcome(getattr(escapes, name)) for name in names}


def _outcome(try_it: Callable[[], str | None]) -> str:
    """An attempt fails by raising, or by finding nothing (None)."""
    try:
        found = try_it()
    except (OSError, MemoryError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "found nothing" if found is None else ESCAPED + found


def _call(name: str, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class _Escapes:
    """Each public method is one attempt and says what it got hold of."""

    def __init__(self, targets: dict[str, Any]) -> None:
        self._targets = targets

    def connect_by_tcp(self) -> str:
        socket.create_connection(("127.0.0.1", self._targets["tcp_port"]), timeout=1).close()
        return "a port of this machine"

    def connect_to_a_local_socket(self) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect("\0" + self._targets["unix_name"])
        return "an abstract socket of this machine"

    def connect_to_the_hypervisor(self) -> str:
        socket.socket(_AF_VSOCK, socket.SOCK_STREAM).close()
        return "sockets that no network namespace holds back"

    def read_a_file_in_the_home_directory(self) -> str:
        return Path(self._targets["canary"]).read_text()

    def read_the_accounts(self) -> str:
        return Path("/etc/passwd").read_text()[:20]

    def read_the_environment(self) -> str | None:
        return ", ".join(os.environ) or None

    def write_outside(self) -> str:
        Path(self._targets["outside"]).write_text("was here")
        return f"wrote {self._targets['outside']}"

    def write_into_the_system(self) -> str | None:
        for directory in (Path("/"), Path("/usr"), Path("/dev"), Path(os.__file__).parent):
            path = directory / self._targets["unix_name"]
            try:
                path.write_text("was here")
            except OSError:
                continue
            path.unlink()
            return f"wrote into {directory}"
        return None

    def see_other_processes(self) -> str | None:
        proc = Path("/proc")
        entries = [entry.name for entry in proc.iterdir()] if proc.is_dir() else []
        return ", ".join(name for name in entries if name.isdigit()) or None

    def signal_the_parent(self) -> str:
        os.kill(os.getppid() or self._targets["pid"], signal.SIGCONT)
        return "a process outside"

    def use_inherited_descriptors(self) -> str | None:
        found = []
        for fd in range(4, 1024):
            try:
                os.fstat(fd)
            except OSError:
                continue
            found.append(str(fd))
        return ", ".join(found) or None

    def become_root_in_a_namespace(self) -> str:
        _call("unshare", _NEW_USER_NAMESPACE)
        return "a user namespace of its own"

    def mount(self) -> str:
        _call("mount", b"none", b"/tmp", b"tmpfs", ctypes.c_ulong(0), None)
        return "a file system without limits"

    def hide_memory_from_the_limits(self) -> str:
        os.close(os.memfd_create("hidden"))
        return "memory that no limit counts"

    def exhaust_memory(self) -> str:
        bytearray(self._targets["memory_bytes"])
        return f"{self._targets['memory_bytes']} bytes"

    def write_a_file_without_end(self) -> str:
        path = Path("/tmp/long")
        with path.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, self._targets["file_bytes"] + 1)
            finally:
                path.unlink()
        return f"wrote more than {self._targets['file_bytes']} bytes"

    def fill_the_disk(self) -> str | None:
        scratch = os.statvfs("/tmp")
        size = scratch.f_blocks * scratch.f_frsize
        return None if size <= self._targets["scratch_bytes"] else f"{size} bytes of scratch"

    def start_more_processes(self) -> str | None:
        """Children wait for the end of a pipe, so that all of them are there at once."""
        most, children = self._targets["processes"], 0
        wait, release = os.pipe()
        try:
            while children <= most + 8:
                if os.fork() == 0:
                    os.close(release)
                    os.read(wait, 1)
                    os._exit(0)
                children += 1
        except OSError:
            pass
        finally:
            os.close(release)
            for _ in range(children):
                os.wait()
            os.close(wait)
        # The kernel's count may include two processes of the launcher, and may not.
        allowed = most + 1 if most > 1 else 0
        return None if children <= allowed else f"{children} processes"

    def start_more_threads(self) -> str | None:
        most = 256
        threads: list[threading.Thread] = []
        release = threading.Event()
        threading.stack_size(65536)
        try:
            for _ in range(most):
                thread = threading.Thread(target=release.wait)
                thread.start()
                threads.append(thread)
        except RuntimeError:
            return None
        finally:
            release.set()
            for thread in threads:
                thread.join()
            threading.stack_size(0)
        return f"{most} threads"

    def raise_the_limits(self) -> str:
        unlimited = resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_AS, (unlimited, unlimited))
        return "as much memory as it likes"
