"""Progress of long work on stderr: one rewritten line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time

LINE_INTERVAL_S = 10.0
TERMINAL_INTERVAL_S = 0.2


def say(text: str) -> None:
    """One line of log for a person."""
    print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`75` -> `1:15`, `3675` -> `1:01:15`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Counts up to `total`, of which an earlier attempt did `done`, and says how long the rest will
    take at the pace so far."""

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self._label = label
        self._total = total
        self._before = done
        self._done = done
        self._began = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._shown_at = self._began

    def advance(self, note: str = "") -> None:
        self._done += 1
        now = time.monotonic()
        last = self._done == self._total
        interval = TERMINAL_INTERVAL_S if self._terminal else LINE_INTERVAL_S
        if not last and now - self._shown_at < interval:
            return
        self._shown_at = now
        elapsed = now - self._began
        left = elapsed / (self._done - self._before) * (self._total - self._done)
        when = f"{duration(elapsed)}" if last else f"{duration(left)} left"
        line = f"{self._label} {self._done}/{self._total} · {note + ' · ' if note else ''}{when}"
        if self._terminal:
            # A line that wraps cannot be taken back.
            line = line[: shutil.get_terminal_size().columns - 1]
            print(f"\r\x1b[K{line}", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            say(line)
