"""The operating system's view of an engine, for tests that kill one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import ray


def processes(actor: Any) -> dict[str, int]:
    """The pids of the actor's own process (`actor`) and of its children's, by name."""
    me = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))
    return {"actor": me} | {_name(pid): pid for pid in children(me)}


def children(pid: int) -> list[int]:
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


async def gone(pids: Collection[int], within_s: float = 20.0) -> bool:
    """Whether all of them end in time."""
    until = time.monotonic() + within_s
    while any(map(alive, pids)) and time.monotonic() < until:
        await asyncio.sleep(0.1)
    return not any(map(alive, pids))
