"""Tables written to numbered files, Parquet or JSON lines."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal, Self

from posttrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

SHARD_ROWS = 100_000
GROUP_ROWS = 10_000
"""Rows that Parquet keeps together: smaller chunks are collected."""


class Shards(ABC):
    """`part-00000`, `part-00001`, … of about `SHARD_ROWS` rows; one without rows if there are none.
    The same rows give the same files."""

    suffix: str

    def __init__(self, directory: Path, schema: pa.Schema) -> None:
        directory.mkdir()
        self._directory = directory
        self._schema = schema
        self._pending: list[pa.Table] = []
        self._pending_lines: list[str] = []
        self._num_pending = 0
        self._room = 0
        self._num_shards = 0
        self._is_open = False

    def write(self, table: pa.Table, lines: Sequence[str] | None) -> None:
        """Rows, and their lines as they stand in the source where that has lines."""
        self._pending.append(table)
        self._pending_lines += lines or []
        self._num_pending += table.num_rows
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
        import pyarrow as pa

        if self._room <= 0:
            if self._is_open:
                self._end()
                self._is_open = False
            self._begin(self._directory / f"part-{self._num_shards:05d}{self.suffix}")
            self._is_open = True
            self._num_shards += 1
            self._room = SHARD_ROWS
        table = pa.concat_tables([self._schema.empty_table(), *self._pending])
        self._put(table, self._pending_lines)
        self._room -= table.num_rows
        self._pending, self._pending_lines, self._num_pending = [], [], 0

    @abstractmethod
    def _begin(self, path: Path) -> None: ...

    @abstractmethod
    def _put(self, table: pa.Table, lines: list[str]) -> None: ...

    @abstractmethod
    def _end(self) -> None: ...


class ParquetShards(Shards):
    """Raises DataError for columns that Parquet does not have."""

    suffix = ".parquet"
    _writer: Any

    def _begin(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            self._writer = pq.ParquetWriter(path, self._schema)
        except pa.ArrowNotImplementedError as error:
            raise DataError(f"{error} Ask for JSON lines (--format jsonl).") from error

    def _put(self, table: pa.Table, lines: list[str]) -> None:  # noqa: ARG002
        if table.num_rows:  # `datasets` cannot read a group without rows
            self._writer.write_table(table)

    def _end(self) -> None:
        self._writer.close()


class JsonShards(Shards):
    """Raises DataError for values that JSON does not have."""

    suffix = ".jsonl"
    _file: IO[str]

    def _begin(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def _put(self, table: pa.Table, lines: list[str]) -> None:
        if not lines:
            try:
                lines = [json.dumps(row, ensure_ascii=False) for row in table.to_pylist()]
            except TypeError as error:
                raise DataError(f"{error}. Ask for Parquet (--format parquet).") from error
        self._file.writelines(f"{line}\n" for line in lines)

    def _end(self) -> None:
        self._file.close()


def make_shards(form: Literal["parquet", "jsonl"], directory: Path, schema: pa.Schema) -> Shards:
    return (ParquetShards if form == "parquet" else JsonShards)(directory, schema)
