"""What a trainer logs, on its way from rank 0 to the driver while both are at work: a file."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
POLL_S = 0.5


def write_record(file: Path, record: Record) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as log:
        log.write(json.dumps(record) + "\n")


@contextmanager
def followed(file: Path, on_record: Callable[[Record], None]) -> Iterator[None]:
    """Hands over, in a thread of its own, every record that is written to `file` meanwhile; all
    have been when the block is left. What `on_record` raises is raised there."""
    position = file.stat().st_size if file.exists() else 0
    written = threading.Event()

    def follow() -> None:
        at = position
        while True:
            last = written.wait(POLL_S)
            at = _read_from(file, at, on_record)
            if last:
                return

    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(follow)
        try:
            yield
        finally:
            written.set()
        following.result()


def _read_from(file: Path, position: int, on_record: Callable[[Record], None]) -> int:
    """Returns where the first line begins that is not whole yet."""
    if not file.exists():
        return position
    with file.open("rb") as log:
        log.seek(position)
        for line in log:
            if not line.endswith(b"\n"):
                break
            on_record(json.loads(line))
            position += len(line)
    return position
