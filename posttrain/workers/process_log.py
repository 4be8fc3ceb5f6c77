"""What this process and its children wrote to their log, to find the cause of a failed start.

vLLM's engine core dies in a process of its own and leaves its reason in its output alone; under Ray
that is a file.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

ERROR = re.compile(r"\b((?:\w+\.)*\w*(?:Error|Exception)): (.+)$", re.MULTILINE)
STREAMS = (1, 2)


class ProcessLog:
    """Remembers where stdout and stderr end now."""

    def __init__(self) -> None:
        self._ends = {
            stream: status.st_size
            for stream in STREAMS
            if stat.S_ISREG((status := os.fstat(stream)).st_mode)
        }

    def last_error(self) -> str | None:
        """The last line since then that names an exception and says something; None if none does,
        or if the log is a terminal or a pipe, where a person has seen it."""
        found = None
        for stream, end in self._ends.items():
            with Path(f"/proc/self/fd/{stream}").open("rb") as log:
                log.seek(end)
                errors = ERROR.findall(log.read().decode(errors="replace"))
            for name, text in errors:
                if "See root cause above" not in text:
                    found = f"{name}: {text}"
        return found
