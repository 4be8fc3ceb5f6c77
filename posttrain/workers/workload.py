"""What a place of a pool has to do, and how long it had nothing to do."""

from __future__ import annotations

import threading
import time


class Workload:
    """Of one engine, or one copy of a teacher. Usable from several threads."""

    def __init__(self) -> None:
        self.outstanding = 0
        """Answers that are being waited for."""
        self._lock = threading.Lock()
        self._asked_at = self._changed_at = time.monotonic()
        self._idle_s = 0.0

    def add(self, amount: int) -> None:
        """So many answers more are waited for; fewer, if negative."""
        with self._lock:
            self._note_idle()
            self.outstanding += amount

    def idle_share(self) -> float:
        """Of the time since this was last asked, the share in which nothing was outstanding."""
        with self._lock:
            self._note_idle()
            whole = self._changed_at - self._asked_at
            share = self._idle_s / whole if whole else 0.0
            self._asked_at, self._idle_s = self._changed_at, 0.0
            return share

    def _note_idle(self) -> None:
        now = time.monotonic()
        if not self.outstanding:
            self._idle_s += now - self._changed_at
        self._changed_at = now
