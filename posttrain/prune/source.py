"""Where rows come from: what every source can do, and which one a name means."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from posttrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK_ROWS = 1000
JSON_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIX = ".parquet"
FILE_SUFFIXES = (*JSON_SUFFIXES, PARQUET_SUFFIX, ".json", ".csv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Row `number` (from 0) of a source, which is row or line `place` (from 1) of `file`.

    `record` holds the columns that were asked for; of a row that is not `readable`, `problem` says
    why and `content` what stands there, as far as it can be shown.
    """

    number: int
    file: str
    place: int
    record: Mapping[str, Any] | None
    problem: str | None = None
    content: str = ""
    offset: int | None = None
    length: int | None = None


class Source(Protocol):
    """Rows in a fixed order, read in chunks.

    `fingerprint` names the content; `stem` is what rows without a domain are called; `columns` are
    those of the table, or of the first rows of JSON.
    """

    @property
    def stem(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def revision(self) -> str | None:
        """What pins a name on the hub; None for files."""
        ...

    @property
    def columns(self) -> Sequence[str]: ...

    def count(self) -> int: ...

    def rows(self, wanted: NDArray[np.bool_] | None, columns: Sequence[str]) -> Iterator[Row]:
        """The wanted of the first `len(wanted)` rows (None: all rows), with the given columns; a
        JSON record comes whole."""
        ...

    def schema(self) -> pa.Schema:
        """Of all readable rows; for JSON lines, after `rows` has been run through or `restore`d."""
        ...

    def restore(self, schema: pa.Schema) -> None: ...

    def tables(self, wanted: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], pa.Table]]:
        """The wanted of the first `len(wanted)` rows with all columns, and their numbers."""
        ...

    def lines(self, wanted: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], Sequence[str]]]:
        """The same as JSON lines: where the source has lines, these as they stand."""
        ...


def open_source(
    name: str,
    *,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    one_table: bool = True,
) -> Source:
    """A JSON lines or Parquet file, a directory of either, or whatever `datasets` can load.

    With `one_table`, a JSON row that does not fit into one table with the others cannot be read,
    and what would change in one table is refused: Parquet files at once, JSON as it is read.

    Raises:
        DataError: nothing there, nothing in it, no split of that name, or files that are refused.
    """
    from posttrain.prune.table_source import datasets_source

    return _files_source(name, one_table=one_table) or datasets_source(
        name, split=split, subset=subset, revision=revision
    )


def open_splits(name: str, *, split: str | None, subset: str | None) -> list[Source]:
    """The same where rows need not fit into one table; without a `split`, all that there are.
    Files are one. Raises DataError as `open_source`."""
    from posttrain.prune.table_source import datasets_source, split_names

    files = _files_source(name, one_table=False)
    if files is not None:
        return [files]
    names = [split] if split is not None else split_names(name, subset)
    return [datasets_source(name, split=s, subset=subset, revision=None) for s in names]


def _files_source(name: str, *, one_table: bool) -> Source | None:
    """None: left to `datasets`. Raises DataError."""
    from posttrain.prune.json_source import JsonSource
    from posttrain.prune.table_source import parquet_source

    path = Path(name)
    is_name = len(path.parts) <= 2 and not path.is_absolute() and path.suffix not in FILE_SUFFIXES
    if not path.exists() and not is_name:
        raise DataError(f"{name}: there is no such file or directory")
    if path.is_file():
        if path.suffix in JSON_SUFFIXES:
            return JsonSource([path], one_table=one_table)
        if path.suffix == PARQUET_SUFFIX:
            return parquet_source([path], one_table=one_table)
        raise DataError(
            f"{name}: a source ends in .jsonl or .parquet, or is a directory or name that "
            "`datasets` can load"
        )
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if not p.name.startswith("."))
        if files and all(file.suffix in JSON_SUFFIXES for file in files):
            return JsonSource(files, one_table=one_table)
        if files and all(file.suffix == PARQUET_SUFFIX for file in files):
            return parquet_source(files, one_table=one_table)
    return None


def hash_files(files: Sequence[Path]) -> str:
    """Of names and contents (16 hex digits)."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            inner = hashlib.file_digest(content, "sha256").hexdigest()
        digest.update(f"{file.name} {inner}\n".encode())
    return digest.hexdigest()[:16]


def is_wanted(wanted: NDArray[np.bool_] | None, number: int) -> bool:
    return wanted is None or bool(wanted[number])
