"""Work that goes on beside training every so many steps."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class Periodic:
    """Runs `work(step)` after every `every_steps`th step, one at a time, while training goes on.

    Consumes steps, produces whatever `work` does. Waits for: a step that is due. Woken by:
    `reached`. A step that comes due while the work of an earlier one goes on waits for it; of
    several, the last one counts.
    """

    def __init__(self, every_steps: int, work: Callable[[int], Awaitable[None]]) -> None:
        self._every_steps = every_steps
        self._work = work
        self._due: int | None = None
        self._woken = asyncio.Event()
        self._working = False

    def is_due(self, step: int) -> bool:
        return step % self._every_steps == 0

    @property
    def busy(self) -> bool:
        """The work of a step goes on, or is about to begin."""
        return self._working or self._woken.is_set()

    def reached(self, step: int) -> None:
        if self.is_due(step):
            self._due = step
            self._woken.set()

    async def run(self) -> None:
        """For ever: whoever starts it cancels it. What `work` raises ends it."""
        while True:
            await self._woken.wait()
            self._woken.clear()
            assert self._due is not None
            self._working = True
            try:
                await self._work(self._due)
            finally:
                self._working = False
