"""Who drives a run."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from posttrain.errors import RunDirError


class Lease:
    """One driver per run: an flock on `path`, which tells who holds it.

    The operating system frees it when the process ends, however it ends. Children do not inherit
    it: an orphan must not keep the next driver out.
    """

    _held: set[IO[str]] = set()  # noqa: RUF012 (of the process, on purpose)

    def __init__(self, path: Path) -> None:
        """RunDirError names the process and host that hold the lease."""
        self._file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = _describe_holder(self._file.read())
            self._file.close()
            raise RunDirError(
                f"{path.parent} is being driven by another process: {holder};"
                " wait for it, stop it, or choose another run.dir"
            ) from None
        self._file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S%z")
        own = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
        self._file.write(json.dumps(own))
        self._file.flush()
        Lease._held.add(self._file)

    def release(self) -> None:
        """Free the lease. The file stays: deleting it would race with the next driver."""
        Lease._held.discard(self._file)
        self._file.close()

    @classmethod
    def _drop_in_child(cls) -> None:
        # A forked child shares the lock; closing its copy leaves the parent's alone.
        for file in cls._held:
            file.close()
        cls._held.clear()


os.register_at_fork(after_in_child=Lease._drop_in_child)


def _describe_holder(text: str) -> str:
    if not text:
        return "one that is just starting"
    holder = json.loads(text)
    return f"pid {holder['pid']} on host {holder['host']}, started {holder['started']}"
