"""Sandboxes for tests, opened once per launcher and settings, and launchers that fail."""

from __future__ import annotations

import os
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest

from posttrain.errors import SandboxError
from rewards.sandbox import Sandbox
from rewards.sandbox_launcher import (
    BUBBLEWRAP,
    OWN,
    Command,
    Launcher,
    SandboxSettings,
    Unavailable,
    unsafe_command,
)

LAUNCHERS = {"own": OWN, "bubblewrap": BUBBLEWRAP}
INSTALLED = ["own", "bubblewrap"] if shutil.which("bwrap") else ["own"]

QUICK = SandboxSettings(cpu_s=1, wall_s=20.0, memory_mb=256, file_mb=4, scratch_mb=8)
"""Limits that are soon broken. The wall-clock is long because test machines are busy."""

PATIENT = QUICK.model_copy(update={"cpu_s": 10})
"""For what fills its memory: where the machine has to find the pages first, a second may go by
before the limit on memory is reached, and the one on time is seen instead."""

FORKING = QUICK.model_copy(update={"processes": 8})


@cache
def _opened(launcher: str, settings: SandboxSettings) -> Sandbox | str:
    try:
        return Sandbox(settings, launchers=[LAUNCHERS[launcher]])
    except SandboxError as error:
        return str(error)


def open_or_skip(launcher: str, settings: SandboxSettings = QUICK) -> Sandbox:
    """Skips, with the reason, where this launcher is not there or does not hold."""
    sandbox = _opened(launcher, settings)
    if isinstance(sandbox, str):
        pytest.skip(sandbox)
    return sandbox


def close_all() -> None:
    for launcher in LAUNCHERS:
        for settings in (QUICK, PATIENT, FORKING):
            sandbox = _opened(launcher, settings)
            if isinstance(sandbox, Sandbox):
                sandbox.close()
    _opened.cache_clear()


def user_namespace(pid: int | str) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/user")  # noqa: PTH115 (a magic link, not a path)
    except OSError:  # another user's, or gone
        return None


def processes_in(sandbox: Sandbox) -> set[int]:
    """Everything that lives in the sandbox's user namespace, which nothing in it can leave."""
    children = Path(f"/proc/{sandbox.pid}/task/{sandbox.pid}/children").read_text().split()
    namespace = user_namespace(children[0])
    assert namespace is not None and namespace != user_namespace("self")
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return {pid for pid in pids if user_namespace(pid) == namespace}


def _no_bubblewrap(settings: SandboxSettings, control_fd: int) -> Command:
    raise Unavailable("not installed")


def _forbidden(settings: SandboxSettings, control_fd: int) -> Command:
    return Command([sys.executable, "-S", "-c", "raise SystemExit('unshare: not permitted')"])


def _silent(settings: SandboxSettings, control_fd: int) -> Command:
    return Command([sys.executable, "-S", "-c", "raise SystemExit(7)"])


def _missing(settings: SandboxSettings, control_fd: int) -> Command:
    return Command(["/no/such/launcher"])


ABSENT = Launcher("absent", isolates=True, command=_no_bubblewrap)
FORBIDDEN = Launcher("forbidden", isolates=True, command=_forbidden)
SILENT = Launcher("silent", isolates=True, command=_silent)
MISSING = Launcher("missing", isolates=True, command=_missing)
LEAKY = Launcher("leaky", isolates=True, command=unsafe_command)
"""Says that it isolates and does nothing of the kind: only the probe can tell."""
