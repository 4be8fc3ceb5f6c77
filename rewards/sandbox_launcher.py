"""How the zygote is started: by bubblewrap, by our own launcher, or, unsafely, just so."""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from rewards.sandbox_namespaces import DEVICES, NOBODY
from rewards.sandbox_zygote import SCRATCH

MAX_MEMORY_MB = 4096
"""MiB of address space of a scorer process: what its sandbox runs inherits that limit."""


class SandboxSettings(BaseModel):
    """What a program may use. A limit that it breaks is its own doing, not a failure of ours.

    The limits are those of a process, so that no control group is needed, which few machines let
    their users make: a program that may not fork has one address space, its files are bounded, and
    what other memory there is (shared segments, anonymous files, message queues) the filter of
    system calls refuses.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    unsafe: bool = Field(
        default=False, description="where no sandbox works, run programs without one"
    )
    cpu_s: int = Field(default=4, gt=0, description="seconds of CPU time, all threads together")
    wall_s: float = Field(default=6.0, gt=0, description="seconds of wall-clock, sleep included")
    memory_mb: int = Field(
        default=512,
        ge=64,
        le=MAX_MEMORY_MB,
        description="MiB of address space, Python included; at most those of a scorer process",
    )
    file_mb: int = Field(default=16, gt=0, description="MiB of each file: stdout, stderr, result")
    scratch_mb: int = Field(default=64, gt=0, description="MiB of all files that it creates")
    processes: int = Field(
        default=1,
        ge=1,
        le=64,
        description="1: it may not fork. More: each process may use memory_mb, and threads count "
        "as processes",
    )
    modules: tuple[str, ...] = Field(
        default=(), description="installed modules that programs may import; loaded beforehand"
    )


@dataclass(frozen=True)
class Command:
    """What to execute, as whom (None: as we are), and its whole environment."""

    arguments: list[str]
    user: int | None = None
    environment: Mapping[str, str] = field(
        default_factory=lambda: {
            # The same order of sets in every zygote, so that an answer scores the same twice.
            "PYTHONHASHSEED": "0",
            # A thread must not reserve 128 MiB of address space for itself.
            "MALLOC_ARENA_MAX": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
    )


class Unavailable(Exception):
    """This way of starting cannot even be tried here."""


@dataclass(frozen=True)
class Launcher:
    """`command` makes the command for a control socket; raises Unavailable."""

    name: str
    isolates: bool
    command: Callable[[SandboxSettings, int], Command]


def bubblewrap_command(settings: SandboxSettings, control_fd: int) -> Command:
    """Root becomes nobody beforehand, because bubblewrap maps one user only."""
    path = shutil.which("bwrap")
    if path is None:
        raise Unavailable("not installed")
    namespaces = "--unshare-user --uid 0 --gid 0 --unshare-pid --as-pid-1 --unshare-net"
    arguments = [path, *namespaces.split(), "--unshare-ipc", "--unshare-uts", "--hostname"]
    arguments += ["sandbox", "--unshare-cgroup-try", "--cap-add", "CAP_SYS_ADMIN"]
    for shown in system_paths(settings):
        if Path(shown).is_symlink():
            arguments += ["--symlink", str(Path(shown).readlink()), shown]
        else:
            arguments += ["--ro-bind", shown, shown]
    ours, inside = str(Path(__file__).parent), "/sandbox/rewards"
    arguments += ["--ro-bind", ours, inside, "--proc", "/proc", "--dir", SCRATCH]
    for device in DEVICES:
        arguments += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    arguments += ["--symlink", SCRATCH, "/dev/shm", "--remount-ro", "/"]
    config = zygote_config(settings, control_fd, isolated=True, user=None)
    arguments += ["--", *_python("rewards.sandbox_zygote", "/sandbox", config)]
    return Command(arguments, user=NOBODY if os.geteuid() == 0 else None)


def own_command(settings: SandboxSettings, control_fd: int) -> Command:
    user = NOBODY if os.geteuid() == 0 else None
    config = zygote_config(settings, control_fd, isolated=True, user=user)
    config["system_paths"] = system_paths(settings)
    return Command(_python("rewards.sandbox_namespaces", _root(), config))


def unsafe_command(settings: SandboxSettings, control_fd: int) -> Command:
    config = zygote_config(settings, control_fd, isolated=False, user=None)
    return Command(_python("rewards.sandbox_zygote", _root(), config))


BUBBLEWRAP = Launcher("bubblewrap", isolates=True, command=bubblewrap_command)
OWN = Launcher("own launcher", isolates=True, command=own_command)
UNSAFE = Launcher("none (unsafe)", isolates=False, command=unsafe_command)


def zygote_config(
    settings: SandboxSettings, control_fd: int, *, isolated: bool, user: int | None
) -> dict[str, Any]:
    """What the zygote is told. `user` is the uid and gid of programs; None: the zygote's own."""
    return {
        "control_fd": control_fd,
        "isolated": isolated,
        "user": user,
        "pid_namespace_fd": None,
        "cpu_s": settings.cpu_s,
        "memory_bytes": settings.memory_mb << 20,
        "file_bytes": settings.file_mb << 20,
        "scratch_bytes": settings.scratch_mb << 20,
        "processes": settings.processes,
        "modules": settings.modules,
        "module_paths": _module_paths(settings),
    }


def system_paths(settings: SandboxSettings) -> list[str]:
    """What of this machine a program can see, read-only: the system's libraries and programs,
    Python, and with `modules` the directories where packages are installed."""
    wanted = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache"]
    wanted += [os.path.realpath(sys.base_prefix), *_module_paths(settings)]
    there = [path for path in wanted if Path(path).exists()]
    return [path for path in there if not any(path.startswith(f"{top}/") for top in there)]


def _module_paths(settings: SandboxSettings) -> list[str]:
    if not settings.modules:
        return []
    paths = sysconfig.get_paths()
    found = sorted({os.path.realpath(paths[key]) for key in ("purelib", "platlib")})
    for path in found:
        if path.startswith(f"{SCRATCH}/"):
            raise Unavailable(
                f"modules are installed in {path}, but programs get a {SCRATCH} of their own; "
                "install elsewhere"
            )
    return found


def _root() -> str:
    return str(Path(__file__).parent.parent)


def _python(module: str, root: str, config: Mapping[str, Any]) -> list[str]:
    """Runs `main(config)` of one of our modules, with nothing on the path but the standard library
    and, until it is imported, our own."""
    code = (
        f"import json, sys; sys.path.insert(0, {root!r}); from {module} import main; "
        "del sys.path[0]; main(json.loads(sys.argv[1]))"
    )
    python = os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]
    return [python, "-P", "-s", "-S", "-B", "-X", "utf8", "-c", code, json.dumps(config)]
