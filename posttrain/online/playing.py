"""The draws that are being answered: one task each, and how long there was none."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any


class Playing:
    """Tasks of a group, each forgotten when it is done.

    While there is none, nothing is generated or scored: the learner holds every slot, or a publish
    is under way.
    """

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle_s = 0.0
        self._idle_since: float | None = None  # None: something is played, or nothing ever was

    def start(self, play: Coroutine[Any, Any, None]) -> None:
        task = self._group.create_task(play)
        self._idle_s, self._idle_since = self._idle_until(task.get_loop().time()), None
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def take_idle_s(self) -> float:
        """Seconds since the last call in which nothing was played; from the first draw on."""
        now = asyncio.get_running_loop().time()
        idle_s, self._idle_s = self._idle_until(now), 0.0
        if self._idle_since is not None:
            self._idle_since = now
        return idle_s

    def __iter__(self) -> Iterator[asyncio.Task[None]]:
        return iter(self._tasks)

    def _idle_until(self, now: float) -> float:
        return self._idle_s + (0.0 if self._idle_since is None else now - self._idle_since)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not self._tasks:
            self._idle_since = task.get_loop().time()
