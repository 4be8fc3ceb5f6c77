"""Does the sandbox hold? Finds out by trying to get out of it, with something outside to reach."""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rewards import sandbox_escapes
from rewards.sandbox_launcher import SandboxSettings

PROBE = Path(sandbox_escapes.__file__).read_text(encoding="utf-8")
"""The program that tries; its function is `attempt`."""


@dataclass(frozen=True)
class Targets:
    """What the attempts are aimed at. All of it exists while the probe runs."""

    pid: int
    tcp_port: int
    unix_name: str
    canary: str
    outside: str
    memory_bytes: int
    file_bytes: int
    scratch_bytes: int
    processes: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Attempt:
    """One attempt, whether it was contained, and what stopped it or what it got hold of."""

    name: str
    contained: bool
    detail: str


@contextmanager
def targets(settings: SandboxSettings) -> Iterator[Targets]:
    """Listens, and lays a canary into the home directory (or, where it cannot be written, into the
    directory for temporary files)."""
    home = os.path.expanduser("~")  # noqa: PTH111 (Path.home() fails for a user without a name)
    place = home if os.access(home, os.W_OK) else None
    name = f"posttrain-probe-{secrets.token_hex(8)}"
    with (
        tempfile.TemporaryDirectory(prefix=".posttrain-probe-", dir=place) as directory,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        # Open to all, so that nothing but the sandbox keeps a program out.
        Path(directory).chmod(0o777)
        canary = Path(directory) / "canary"
        canary.write_text("a secret")
        unix.bind("\0" + name)
        unix.listen()
        yield Targets(
            pid=os.getpid(),
            tcp_port=tcp.getsockname()[1],
            unix_name=name,
            canary=str(canary),
            outside=str(Path(directory) / "written"),
            memory_bytes=settings.memory_mb << 20,
            file_bytes=settings.file_mb << 20,
            scratch_bytes=settings.scratch_mb << 20,
            processes=settings.processes,
        )


def judge(outcomes: Mapping[str, str]) -> tuple[Attempt, ...]:
    """From what `sandbox_escapes.attempt` returned."""
    return tuple(
        Attempt(name, not detail.startswith(sandbox_escapes.ESCAPED), detail)
        for name, detail in outcomes.items()
    )
