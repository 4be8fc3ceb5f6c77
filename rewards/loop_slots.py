"""How much may be under way at once, per event loop: whoever comes later waits."""

from __future__ import annotations

import asyncio
from weakref import WeakKeyDictionary


class LoopSlots:
    """A semaphore belongs to one event loop; what holds it may be used from several."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._by_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
            WeakKeyDictionary()
        )

    def here(self) -> asyncio.Semaphore:
        """That of the running loop."""
        loop = asyncio.get_running_loop()
        slots = self._by_loop.get(loop)
        if slots is None:
            slots = self._by_loop[loop] = asyncio.Semaphore(self._count)
        return slots
