"""The few Linux calls that Python's standard library lacks, and the filter of system calls.

Imported inside the sandbox: the standard library only, nothing of ours.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from typing import Any

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
_CLONE_THREAD = 0x00010000
_CLONE_NEW = 0x7E020000  # every namespace flag of clone()

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 0x1, 0x2, 0x4, 0x8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 0x20, 0x1000, 0x4000, 0x40000
MNT_DETACH = 0x2

ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC = 0x1, 0x2, 0x4, 0x8

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000

# pivot_root, and what the filter refuses: (x86-64, aarch64); None where it does not exist.
# From 424 on the numbers are the same everywhere.
_PIVOT_ROOT = (155, 41)
_MOUNT_SETATTR = 442
_FORKS: tuple[tuple[int | None, int | None], ...] = ((57, None), (58, None))  # fork, vfork
_CLONE, _CLONE3, _SOCKET = (56, 220), 435, (41, 198)
_SETRLIMIT, _PRLIMIT = (160, 164), (302, 261)
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # Other namespaces, mounts, processes.
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": _PIVOT_ROOT,
    "chroot": (161, 51),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    # Memory that no limit of a process counts.
    "memfd_create": (319, 279),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    # Kernel interfaces that have been ways out and that no answer needs.
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "modify_ldt": (154, None),
    "personality": (135, 92),
    "syslog": (103, 116),
    "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    **{
        name: (number, number)
        for name, number in {
            "io_uring_setup": 425,
            "io_uring_enter": 426,
            "io_uring_register": 427,
            "open_tree": 428,
            "move_mount": 429,
            "fsopen": 430,
            "fsconfig": 431,
            "fsmount": 432,
            "fspick": 433,
            "pidfd_getfd": 438,
            "process_madvise": 440,
            "mount_setattr": _MOUNT_SETATTR,
            "memfd_secret": 447,
        }.items()
    },
}
_NEWEST_KNOWN = 450
"""Calls with higher numbers are newer than this list: not there, as on an old kernel."""

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def _column() -> tuple[int, int]:
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(f"no filter of system calls is known for a {machine} machine")
    return _ARCHITECTURES[machine]


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), f"unshare({flags:#x})")


def setns(fd: int, flags: int) -> None:
    _check(_libc.setns(fd, flags), "setns")


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    def encode(text: str | None) -> bytes | None:
        return None if text is None else os.fsencode(text)

    arguments = encode(source), encode(target), encode(kind), ctypes.c_ulong(flags)
    _check(_libc.mount(*arguments, os.fsencode(options)), f"mount on {target}")


def unmount(target: str) -> None:
    _check(_libc.umount2(os.fsencode(target), MNT_DETACH), f"unmount {target}")


def pivot_root(new: str, old: str) -> None:
    number = _PIVOT_ROOT[_column()[0]]
    _check(_libc.syscall(number, os.fsencode(new), os.fsencode(old)), f"pivot_root to {new}")


def set_mount_attributes(target: str, attributes: int) -> None:
    """For the mount at `target` and every mount below it (Linux 5.12)."""
    request = struct.pack("=QQQQ", attributes, 0, 0, 0)
    _check(
        _libc.syscall(
            _MOUNT_SETATTR, _AT_FDCWD, os.fsencode(target), _AT_RECURSIVE, request, len(request)
        ),
        f"mount_setattr on {target}",
    )


def _prctl(option: int, *arguments: Any) -> None:
    padded = [*arguments, 0, 0, 0, 0][:4]
    _check(_libc.prctl(option, *map(_as_word, padded)), f"prctl({option})")


def _as_word(value: Any) -> Any:
    return ctypes.c_ulong(value) if isinstance(value, int) else value


def die_with_parent(signal_number: int) -> None:
    """The kernel sends the signal when the thread that started this process ends."""
    _prctl(_PR_SET_PDEATHSIG, signal_number)


def drop_capabilities() -> None:
    """None are left, and no program that is executed from now on can bring any back."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, bytes(24)), "capset")


class Filter:
    """A seccomp program. What it refuses fails with an error in the program, which lives on.

    Args:
        may_fork: processes may be started (never in namespaces of their own).
    """

    def __init__(self, *, may_fork: bool) -> None:
        code = _program(may_fork)
        self._code = ctypes.create_string_buffer(code, len(code))
        # struct sock_fprog: the number of instructions, padding, where they are.
        self._program = struct.pack("@HP", len(code) // 8, ctypes.addressof(self._code))

    def install(self) -> None:
        """For this process and all that it becomes; it must not gain privileges any more."""
        _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, self._program)


_EPERM, _EAFNOSUPPORT, _ENOSYS = 1, 97, 38
_AF_UNIX = 1
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _IF_EQUAL, _IF_GREATER, _IF_BITS, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, (16, 24)
"""Offsets in struct seccomp_data; of the arguments, their lower halves."""
_RLIMIT_CPU = 0


def _program(may_fork: bool) -> bytes:
    """Classic BPF; an instruction is {u16 code; u8 if_true; u8 if_false; u32 k}."""
    column, architecture = _column()

    def instruction(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, k)

    def refuse(error: int) -> bytes:
        return instruction(_RETURN, _ERROR | error)

    def unless(code: int, k: int, then: bytes) -> bytes:
        """`then` when the comparison holds, else on with what follows."""
        return instruction(code, k, 0, len(then) // 8) + then

    def load_argument(index: int) -> bytes:
        return instruction(_LOAD, _ARGUMENTS[index])

    allow = instruction(_RETURN, _ALLOW)
    forbidden = list(_REFUSED.values()) + ([] if may_fork else list(_FORKS))
    if may_fork:
        clone = load_argument(0) + unless(_IF_BITS, _CLONE_NEW, refuse(_EPERM)) + allow
    else:
        clone = load_argument(0) + unless(_IF_BITS, _CLONE_THREAD, allow) + refuse(_EPERM)
    socket = load_argument(0) + unless(_IF_EQUAL, _AF_UNIX, allow) + refuse(_EAFNOSUPPORT)
    # By a limit of no CPU time a program could pass for one that was killed from outside.
    keep_cpu_limit = unless(_IF_EQUAL, _RLIMIT_CPU, refuse(_EPERM)) + allow
    return b"".join(
        [
            instruction(_LOAD, _ARCHITECTURE),
            instruction(_IF_EQUAL, architecture, 1, 0),
            instruction(_RETURN, _KILL),
            instruction(_LOAD, _NUMBER),
            # Among them, on x86-64, the second set of numbers for 32-bit pointers.
            unless(_IF_GREATER, _NEWEST_KNOWN, refuse(_ENOSYS)),
            # Its flags lie in memory, which a filter cannot read; libc falls back to clone.
            unless(_IF_EQUAL, _CLONE3, refuse(_ENOSYS)),
            *(
                unless(_IF_EQUAL, number, refuse(_EPERM))
                for pair in forbidden
                if (number := pair[column]) is not None
            ),
            unless(_IF_EQUAL, _CLONE[column], clone),
            unless(_IF_EQUAL, _SOCKET[column], socket),
            unless(_IF_EQUAL, _SETRLIMIT[column], load_argument(0) + keep_cpu_limit),
            unless(_IF_EQUAL, _PRLIMIT[column], load_argument(1) + keep_cpu_limit),
            allow,
        ]
    )
