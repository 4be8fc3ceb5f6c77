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

Targets = dict[str, Any]


def attempt(targets: Targets) -> dict[str, str]:
    """`targets` is `sandbox_probe.Targets.as_dict()`."""
    return {name: _outcome(try_it, targets) for name, try_it in _ATTEMPTS.items()}


def _outcome(try_it: Callable[[Targets], str | None], targets: Targets) -> str:
    """An attempt fails by raising, or by finding nothing (None)."""
    try:
        found = try_it(targets)
    except (OSError, MemoryError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "found nothing" if found is None else ESCAPED + found


def _connect_tcp(targets: Targets) -> str:
    socket.create_connection(("127.0.0.1", targets["tcp_port"]), timeout=1).close()
    return "reached a port of this machine"


def _connect_unix(targets: Targets) -> str:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect("\0" + targets["unix_name"])
    return "reached an abstract socket of this machine"


def _connect_vsock(targets: Targets) -> str:
    socket.socket(_AF_VSOCK, socket.SOCK_STREAM).close()
    return "has sockets to the hypervisor"


def _read_home(targets: Targets) -> str:
    return Path(targets["canary"]).read_text()


def _read_accounts(targets: Targets) -> str:
    return Path("/etc/passwd").read_text()[:20]


def _write_outside(targets: Targets) -> str:
    Path(targets["outside"]).write_text("was here")
    return f"wrote {targets['outside']}"


def _write_system(targets: Targets) -> str | None:
    for directory in ("/", "/usr", "/dev", os.path.dirname(os.__file__)):
        path = Path(directory) / targets["unix_name"]
        try:
            path.write_text("was here")
        except OSError:
            continue
        path.unlink()
        return f"wrote into {directory}"
    return None


def _read_environment(targets: Targets) -> str | None:
    return ", ".join(os.environ) or None


def _see_processes(targets: Targets) -> str | None:
    if not os.path.isdir("/proc"):
        return None
    return ", ".join(name for name in os.listdir("/proc") if name.isdigit()) or None


def _signal_parent(targets: Targets) -> str:
    os.kill(os.getppid() or targets["pid"], signal.SIGCONT)
    return "signalled a process outside"


def _use_descriptors(targets: Targets) -> str | None:
    found = []
    for fd in range(4, 1024):
        try:
            os.fstat(fd)
        except OSError:
            continue
        found.append(str(fd))
    return ", ".join(found) or None


def _call(name: str, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _become_root_elsewhere(targets: Targets) -> str:
    _call("unshare", _NEW_USER_NAMESPACE)
    return "made a user namespace"


def _mount(targets: Targets) -> str:
    _call("mount", b"none", b"/tmp", b"tmpfs", ctypes.c_ulong(0), None)
    return "mounted a file system"


def _hide_memory(targets: Targets) -> str:
    os.close(os.memfd_create("hidden"))
    return "has memory that no limit counts"


def _exhaust_memory(targets: Targets) -> str:
    bytearray(targets["memory_bytes"])
    return f"allocated {targets['memory_bytes']} bytes"


def _write_long_file(targets: Targets) -> str | None:
    with Path("/tmp/long").open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, targets["file_bytes"] + 1)
        finally:
            os.unlink("/tmp/long")
    return f"wrote more than {targets['file_bytes']} bytes"


def _fill_scratch(targets: Targets) -> str | None:
    scratch = os.statvfs("/tmp")
    size = scratch.f_blocks * scratch.f_frsize
    return None if size <= targets["scratch_bytes"] else f"has {size} bytes of scratch"


def _fork_too_often(targets: Targets) -> str | None:
    """Children wait on a pipe that closes when the last attempt was made."""
    most, children = targets["processes"], 0
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
    return None if children <= allowed else f"started {children} processes"


def _start_many_threads(targets: Targets) -> str | None:
    most, threads = 256, []
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
    return f"started {most} threads"


def _raise_limits(targets: Targets) -> str:
    unlimited = resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_AS, (unlimited, unlimited))
    return "raised its limit of memory"


_ATTEMPTS: dict[str, Callable[[Targets], str | None]] = {
    "connect by TCP": _connect_tcp,
    "connect to a local socket": _connect_unix,
    "connect to the hypervisor": _connect_vsock,
    "read a file in the home directory": _read_home,
    "read the accounts": _read_accounts,
    "write outside": _write_outside,
    "write into the system": _write_system,
    "read the environment": _read_environment,
    "see other processes": _see_processes,
    "signal the parent": _signal_parent,
    "use inherited descriptors": _use_descriptors,
    "become root in a namespace": _become_root_elsewhere,
    "mount": _mount,
    "hide memory from the limits": _hide_memory,
    "exhaust memory": _exhaust_memory,
    "write a file without end": _write_long_file,
    "fill the disk": _fill_scratch,
    "start more processes": _fork_too_often,
    "start more threads": _start_many_threads,
    "raise the limits": _raise_limits,
}
