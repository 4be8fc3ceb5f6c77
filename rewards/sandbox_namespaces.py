"""Our own launcher: namespaces and a root directory of our making, then the zygote.

Runs as root or as any user who may create user namespaces. Root keeps no part in what programs do:
they run as `NOBODY`, also as seen from outside.

Imported on the way into the sandbox: the standard library only.
"""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any

from rewards import sandbox_zygote
from rewards.sandbox_syscalls import (
    ATTR_NODEV,
    ATTR_NOEXEC,
    ATTR_NOSUID,
    ATTR_RDONLY,
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    MS_BIND,
    MS_NODEV,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    die_with_parent,
    mount,
    pivot_root,
    set_mount_attributes,
    unmount,
    unshare,
)

NOBODY = 65534
DEVICES = ("null", "zero", "full", "random", "urandom")
_STAGE = "/tmp"
"""Where the new root is put together; any directory that exists would do."""


def main(config: dict[str, Any]) -> None:
    """Stays outside the PID namespace as its keeper; the zygote is the first process in it."""
    _enter_user_namespace(config["user"])
    unshare(
        CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
    )
    zygote = os.fork()
    if zygote == 0:
        die_with_parent(signal.SIGKILL)
        socket.sethostname("sandbox")
        config["pid_namespace_fd"] = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        _make_root(config["system_paths"])
        sandbox_zygote.main(config)
        return
    os.close(config["control_fd"])
    _, status = os.waitpid(zygote, 0)
    raise SystemExit(abs(os.waitstatus_to_exitcode(status)))


def _enter_user_namespace(program_user: int | None) -> None:
    """As root inside. Root outside also brings `program_user` along, under the same number."""
    uid, gid = os.geteuid(), os.getegid()
    if program_user is None:
        unshare(CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
        return
    # Two users can be mapped only from outside: by a child that stays there until it is done.
    entered, enter = os.pipe()
    ours = os.getpid()
    mapper = os.fork()
    if mapper == 0:
        os.close(enter)
        if not os.read(entered, 1):
            os._exit(1)
        for kind in ("uid", "gid"):
            mapping = f"0 0 1\n{program_user} {program_user} 1\n"
            Path(f"/proc/{ours}/{kind}_map").write_text(mapping)
        os._exit(0)
    os.close(entered)
    unshare(CLONE_NEWUSER)
    os.write(enter, b"!")
    os.close(enter)
    _, status = os.waitpid(mapper, 0)
    if status != 0:
        raise OSError(f"cannot map the users 0 and {program_user} into a user namespace")


def _make_root(system_paths: list[str]) -> None:
    """An empty, read-only root with `system_paths` in their places and five devices."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("root", _STAGE, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    Path(_STAGE, "old").mkdir(mode=0o700)
    pivot_root(_STAGE, f"{_STAGE}/old")
    os.chdir("/")
    for path in system_paths:
        _show(path)
    for name in DEVICES:
        _bind(f"/dev/{name}", ATTR_RDONLY | ATTR_NOSUID | ATTR_NOEXEC)
    Path("/dev/shm").symlink_to(sandbox_zygote.SCRATCH)
    Path(sandbox_zygote.SCRATCH).mkdir(exist_ok=True)
    unmount("/old")
    Path("/old").rmdir()
    mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _show(path: str) -> None:
    original = Path(f"/old{path}")
    if original.is_symlink():
        Path(path).symlink_to(original.readlink())
    else:
        _bind(path, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV)


def _bind(path: str, attributes: int) -> None:
    original, place = Path(f"/old{path}"), Path(path)
    if original.is_dir():
        place.mkdir(parents=True, exist_ok=True)
    else:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    mount(str(original), path, None, MS_BIND | MS_REC)
    set_mount_attributes(path, attributes)
