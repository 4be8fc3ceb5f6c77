"""JSON lines as a source: one file or several."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from posttrain.data.json_lines import Line, MalformedLine, parse_object, read_lines
from posttrain.errors import DataError
from posttrain.prune.schema import JsonSchema, Places
from posttrain.prune.source import CHUNK_ROWS, Row, hash_files, is_wanted

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN_BYTES = 2000
CHUNK_BYTES = 64 << 20

Item = TypeVar("Item")


class JsonSource:
    """Implements `Source`."""

    revision: str | None = None

    def __init__(self, files: Sequence[Path], *, one_table: bool) -> None:
        self._files = files
        self._one_table = one_table
        self._schema = JsonSchema()
        self.stem = files[0].stem if len(files) == 1 else files[0].parent.name
        self.fingerprint = hash_files(files)
        self.columns = _columns(_parse(0, *line) for line in self._lines())

    def count(self) -> int:
        return sum(1 for _ in self._lines())

    def rows(self, wanted: NDArray[np.bool_] | None, columns: Sequence[str]) -> Iterator[Row]:  # noqa: ARG002
        """Whole records: a line is read anyway. DataError for one that one table would change."""
        self._schema, places = JsonSchema(), Places()
        parsed = (
            _parse(number, file, line)
            for number, (file, line) in self._first(None if wanted is None else len(wanted))
            if is_wanted(wanted, number)
        )
        for chunk in _chunks(parsed, lambda row: row.length or 0):
            records = [row.record for row in chunk if row.record is not None]
            problems = iter(
                self._schema.admit(records) if self._one_table else [None] * len(records)
            )
            for row in chunk:
                problem = None if row.record is None else next(problems)
                if problem is None and self._one_table:
                    _refuse_changes(row, places)
                yield row if problem is None else replace(row, record=None, problem=problem)

    def schema(self) -> pa.Schema:
        return self._schema.schema

    def restore(self, schema: pa.Schema) -> None:
        self._schema = JsonSchema()
        self._schema.schema = schema

    def tables(self, wanted: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], pa.Table]]:
        import pyarrow as pa

        for numbers, lines in self.lines(wanted):
            try:
                yield numbers, self._schema.table([json.loads(line) for line in lines])
            except (pa.ArrowException, OverflowError) as error:
                raise DataError(
                    f"rows {numbers[0] + 1} to {numbers[-1] + 1} do not fit into one table: "
                    f"{error}. Ask for JSON lines (--format jsonl)."
                ) from error

    def lines(self, wanted: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], Sequence[str]]]:
        texts = (
            (number, line.content.decode().strip())
            for number, (_, line) in self._first(len(wanted))
            if wanted[number] and line.content is not None
        )
        for chunk in _chunks(texts, lambda item: len(item[1])):
            yield np.array([number for number, _ in chunk]), [text for _, text in chunk]

    def _first(self, count: int | None) -> Iterator[tuple[int, tuple[Path, Line]]]:
        return itertools.islice(enumerate(self._lines()), count)

    def _lines(self) -> Iterator[tuple[Path, Line]]:
        for file in self._files:
            for line in read_lines(file):
                yield file, line


def _refuse_changes(row: Row, places: Places) -> None:
    if row.record is not None and (change := places.changed(row.record)) is not None:
        raise DataError(
            f"{row.file}, row {row.place}: {change}. Ask for JSON lines (--format jsonl), which"
            " stay as they are, or take the row out if it is the one that is wrong"
        )


def _columns(rows: Iterable[Row]) -> list[str]:
    """Of the first rows that can be read."""
    readable = (row.record for row in rows if row.record is not None)
    return list(dict.fromkeys(name for r in itertools.islice(readable, CHUNK_ROWS) for name in r))


def _parse(number: int, file: Path, line: Line) -> Row:
    row = partial(
        Row,
        number=number,
        file=str(file),
        place=line.number,
        offset=line.offset,
        length=line.length,
    )
    try:
        text, record = parse_object(line)
    except MalformedLine as error:
        shown = (line.content or b"")[:SHOWN_BYTES].decode(errors="backslashreplace")
        return row(record=None, problem=str(error), content=shown)
    return row(record=record, content=text)


def _chunks(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Up to `CHUNK_ROWS` items, fewer where they are large."""
    chunk: list[Item] = []
    held = 0
    for item in items:
        chunk.append(item)
        held += size(item)
        if len(chunk) == CHUNK_ROWS or held > CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk
