"""Rows written to numbered files: tables as Parquet, lines as JSON lines."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Generic, Self, TypeVar

from posttrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

Rows = TypeVar("Rows")

SHARD_ROWS = 100_000
GROUP_ROWS = 10_000
"""Rows that are written at once, and that Parquet keeps together: smaller chunks are collected."""

SHOWN_BYTES = 60
"""Of a text that cannot be written."""


class Shards(ABC, Generic[Rows]):
    """`part-00000`, `part-00001`, … of about `SHARD_ROWS` rows; one without rows if there are none.
    The same rows give the same files."""

    suffix: str

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self._pending: list[Rows] = []
        self._num_pending = 0
        self._room = 0
        self._num_shards = 0
        self._is_open = False

    def write(self, rows: Rows) -> None:
        self._pending.append(rows)
        self._num_pending += len(rows)  # type: ignore[arg-type]
        if self._num_pending >= GROUP_ROWS:
            self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None and (self._num_pending or not self._num_shards):
                self._flush()
        finally:
            if self._is_open:
                self._end()

    def _flush(self) -> None:
        if self._room <= 0:
            if self._is_open:
                self._end()
                self._is_open = False
            self._begin(self._directory / f"part-{self._num_shards:05d}{self.suffix}")
            self._is_open = True
            self._num_shards += 1
            self._room = SHARD_ROWS
        self._put(self._pending)
        self._room -= self._num_pending
        self._pending, self._num_pending = [], 0

    @abstractmethod
    def _begin(self, path: Path) -> None: ...

    @abstractmethod
    def _put(self, chunks: list[Rows]) -> None: ...

    @abstractmethod
    def _end(self) -> None: ...


class ParquetShards(Shards["pa.Table"]):
    """Raises DataError for columns that Parquet does not have; `check_parquet` does so before."""

    suffix = ".parquet"
    _writer: Any

    def __init__(self, directory: Path, schema: pa.Schema) -> None:
        super().__init__(directory)
        self._schema = schema

    def _begin(self, path: Path) -> None:
        self._writer = _parquet_writer(path, self._schema)

    def _put(self, chunks: list[pa.Table]) -> None:
        import pyarrow as pa

        if any(chunk.num_rows for chunk in chunks):  # `datasets` cannot read a group without rows
            self._writer.write_table(pa.concat_tables(chunks))

    def _end(self) -> None:
        self._writer.close()


class LineShards(Shards[Sequence[str]]):
    """Lines without their ends."""

    suffix = ".jsonl"
    _file: IO[str]

    def _begin(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def _put(self, chunks: list[Sequence[str]]) -> None:
        for chunk in chunks:
            self._file.writelines(f"{line}\n" for line in chunk)

    def _end(self) -> None:
        self._file.close()


def check_parquet(schema: pa.Schema) -> None:
    """Raises DataError for columns that Parquet does not have, objects without keys for example."""
    import pyarrow as pa

    _parquet_writer(pa.BufferOutputStream(), schema).close()


def _parquet_writer(where: Path | pa.BufferOutputStream, schema: pa.Schema) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetWriter(where, schema)
    except pa.ArrowNotImplementedError as error:
        raise DataError(f"{error} Ask for JSON lines (--format jsonl).") from error


def json_lines(table: pa.Table) -> list[str]:
    """A table's rows as JSON. Raises DataError for values that JSON does not have."""
    try:
        return [json.dumps(row, ensure_ascii=False) for row in table.to_pylist()]
    except TypeError as error:
        raise DataError(f"{error}. Ask for Parquet (--format parquet).") from error
    except UnicodeDecodeError as error:  # in a column that was not read, else it was set aside
        found = error.object[:SHOWN_BYTES]
        raise DataError(
            f"{found!r} is no UTF-8 text, and JSON takes no other. Ask for Parquet"
            " (--format parquet)."
        ) from error
