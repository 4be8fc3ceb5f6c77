"""The lines of a file, none of them larger than memory can take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_LINE_BYTES = 32 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """Line `number` (from 1) of a file: `length` bytes from `offset` on, its end not counted.
    `content` is None for a line above `MAX_LINE_BYTES`."""

    number: int
    offset: int
    length: int
    content: bytes | None


def read_lines(path: Path) -> Iterator[Line]:
    """Every line that is not blank."""
    offset = number = 0
    with path.open("rb") as file:
        while content := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            total = len(content)
            whole = content.endswith(b"\n") or total <= MAX_LINE_BYTES
            end = content[-1:]
            while not whole and (more := file.readline(MAX_LINE_BYTES)):
                total += len(more)
                end = more[-1:]
                whole = end == b"\n"
            length = total - (end == b"\n")
            if length > MAX_LINE_BYTES:
                yield Line(number, offset, length, None)
            elif content.strip():
                kept = content.removesuffix(b"\n")
                yield Line(number, offset, length, kept if offset else _without_mark(kept))
            offset += total


def _without_mark(content: bytes) -> bytes:
    return content.removeprefix(_BYTE_ORDER_MARK)
