"""The lines of a file of JSON objects, none of them larger than memory can take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 32 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class MalformedLine(Exception):
    """What is wrong with a line; whoever reads it adds file and number."""


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


def parse_object(line: Line) -> tuple[str, dict[str, Any]]:
    """The line's text and the object that it holds. Raises MalformedLine, also for what Python's
    parser takes and nobody can have meant or write again: a key that stands twice, half of a
    surrogate pair."""
    if line.content is None:
        raise MalformedLine(f"a line of {line.length:,} bytes; the limit is {MAX_LINE_BYTES:,}")
    try:
        text = line.content.decode()
        record = json.loads(text, object_pairs_hook=_once_each)
        if "\\ud" in text.lower():  # half of a surrogate pair is no text that could be written
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise MalformedLine(f"no UTF-8 text ({error.reason} at byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise MalformedLine(f"no JSON ({error.msg} at character {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise MalformedLine(f"no usable JSON ({error})") from error
    if not isinstance(record, dict):
        raise MalformedLine("a JSON object was expected")
    return text, record


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands there twice")
    return record
