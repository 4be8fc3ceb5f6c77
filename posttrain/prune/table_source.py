"""Tables as a source: Parquet files, and whatever the `datasets` library can load."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from posttrain.errors import DataError
from posttrain.prune.shards import json_lines
from posttrain.prune.source import CHUNK_ROWS, Row, hash_files, is_wanted

if TYPE_CHECKING:
    import pyarrow as pa

_FEATURES = b"huggingface"
"""Where `datasets` says in a schema what its columns mean, names of classes for example."""

_WAY_OUT = (
    "Rows that cannot be read are set aside only where a .jsonl or .parquet file itself is given,"
    " or a directory of nothing else."
)

Tables = Callable[[Sequence[str] | None], Iterator[tuple[str, "pa.Table"]]]
"""Chunks of given columns (None: all) in order, each with the file it is from."""


class TableSource:
    """Implements `Source` over chunks that all have the columns of `schema`."""

    def __init__(
        self,
        read: Tables,
        schema: pa.Schema,
        *,
        count: int | None,
        stem: str,
        fingerprint: str,
        revision: str | None = None,
    ) -> None:
        self._read = read
        self._schema = schema
        self._count = count
        self.columns: Sequence[str] = schema.names
        self.stem = stem
        self.fingerprint = fingerprint
        self.revision = revision

    def count(self) -> int:
        if self._count is None:
            first = self.columns[:1]
            self._count = sum(table.num_rows for _, table in self._read(first))
        return self._count

    def rows(self, wanted: NDArray[np.bool_] | None, columns: Sequence[str]) -> Iterator[Row]:
        number, place, current = 0, 0, ""
        for file, table in self._read(columns):
            if wanted is not None and number >= len(wanted):
                return
            if file != current:
                place, current = 0, file
            left = table.num_rows if wanted is None else len(wanted) - number
            indices = range(min(table.num_rows, left))
            chosen = [i for i in indices if is_wanted(wanted, number + i)]
            records = _records(table.take(np.array(chosen, dtype=np.int64)))
            for i, record in zip(chosen, records, strict=True):
                shared = {"number": number + i, "file": file, "place": place + i + 1}
                if isinstance(record, str):
                    yield Row(**shared, record=None, problem=record)  # type: ignore[arg-type]
                else:
                    yield Row(**shared, record=record)  # type: ignore[arg-type]
            number += table.num_rows
            place += table.num_rows

    def schema(self) -> pa.Schema:
        return self._schema

    def restore(self, schema: pa.Schema) -> None:
        pass

    def tables(self, wanted: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], pa.Table]]:
        number = 0
        for _, table in self._read(None):
            mask = wanted[number : number + table.num_rows]
            if mask.any():
                # `wanted` may end within the table.
                chosen = np.flatnonzero(mask)
                yield number + chosen, table.take(chosen)
            number += table.num_rows
            if number >= len(wanted):
                return

    def lines(self, wanted: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], Sequence[str]]]:
        for numbers, table in self.tables(wanted):
            yield numbers, json_lines(table)


def _records(table: pa.Table) -> list[Mapping[str, Any] | str]:
    """Rows as Python values; for one that holds no UTF-8 text, what is wrong with it."""
    try:
        return list(table.to_pylist())
    except UnicodeDecodeError:
        return [_record(table.slice(i, 1)) for i in range(table.num_rows)]


def _record(row: pa.Table) -> Mapping[str, Any] | str:
    try:
        record: Mapping[str, Any] = row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return f"no UTF-8 text ({error.reason} at byte {error.start + 1})"
    return record


def parquet_source(files: Sequence[Path], *, one_table: bool) -> TableSource:
    """With `one_table`, columns have the same type in all files; without, each file's own.

    Raises DataError for a file that is no Parquet or whose columns do not go with the others, and
    as it is read where it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([])
    schemas: dict[Path, pa.Schema] = {}
    features: set[bytes | None] = set()
    count = 0
    for file in files:
        try:
            with pq.ParquetFile(file) as opened:
                count += opened.metadata.num_rows
                features.add((opened.schema_arrow.metadata or {}).get(_FEATURES))
                schemas[file] = opened.schema_arrow
                schema = pa.unify_schemas([schema, schemas[file]], promote_options="permissive")
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file} cannot be read as Parquet: {error}") from error
    if one_table:
        _refuse_changes(schemas, schema)
    if len(features) == 1 and (described := features.pop()) is not None:
        schema = schema.with_metadata({_FEATURES: described})

    def read(columns: Sequence[str] | None) -> Iterator[tuple[str, pa.Table]]:
        wanted = schema if columns is None else pa.schema([schema.field(c) for c in columns])
        for file in files:
            place = 0
            try:
                with pq.ParquetFile(file) as opened:
                    present = [name for name in wanted.names if name in opened.schema_arrow.names]
                    for batch in opened.iter_batches(CHUNK_ROWS, columns=present):
                        table = pa.Table.from_batches([batch])
                        yield str(file), _fitted(table, wanted, cast=one_table)
                        place += table.num_rows
            except (pa.ArrowException, OSError) as error:
                why = " ".join(str(error).split())
                raise DataError(
                    f"{file}: after row {place:,} it cannot be read on ({why}). It may be"
                    " damaged: fetch or write it anew"
                ) from error

    return TableSource(
        read,
        schema,
        count=count,
        stem=files[0].stem if len(files) == 1 else files[0].parent.name,
        fingerprint=hash_files(files),
    )


def _refuse_changes(schemas: Mapping[Path, pa.Schema], whole: pa.Schema) -> None:
    """Raises DataError where values of a file would not stay what they are in the `whole`."""
    for file, schema in schemas.items():
        for field in schema:
            wide = whole.field(field.name).type
            if not _stays_the_same(field.type, wide):
                raise DataError(
                    f"{file}: column {field.name!r} is {field.type}, and in one table with the"
                    f" other files {wide}, which changes values. Write the files with one type, or"
                    " ask for JSON lines (--format jsonl)"
                )


def _stays_the_same(narrow: pa.DataType, wide: pa.DataType) -> bool:
    """Whether any value of the first type can be had in the second: with the same keys, and no
    integer as a fraction."""
    from pyarrow import types

    if narrow == wide or types.is_null(narrow):
        return True
    if types.is_struct(narrow) and types.is_struct(wide):
        if {f.name for f in narrow} != {f.name for f in wide}:
            return False
        return all(_stays_the_same(f.type, wide.field(f.name).type) for f in narrow)
    if _is_list(narrow) and _is_list(wide):
        return _stays_the_same(narrow.value_type, wide.value_type)
    if types.is_uint64(narrow):  # the one integer that has no wider type
        return False
    kinds = (types.is_integer, types.is_floating, types.is_decimal, types.is_temporal)
    return any(is_kind(narrow) and is_kind(wide) for is_kind in (*kinds, _is_text, _is_binary))


def _is_list(kind: pa.DataType) -> bool:
    from pyarrow import types

    return any(
        is_kind(kind) for is_kind in (types.is_list, types.is_large_list, types.is_fixed_size_list)
    )


def _is_text(kind: pa.DataType) -> bool:
    from pyarrow import types

    return any(is_kind(kind) for is_kind in (types.is_string, types.is_large_string))


def _is_binary(kind: pa.DataType) -> bool:
    from pyarrow import types

    return any(is_kind(kind) for is_kind in (types.is_binary, types.is_large_binary))


def _fitted(table: pa.Table, schema: pa.Schema, *, cast: bool) -> pa.Table:
    """The table with all columns of the schema, null where it has none; with `cast` also of its
    types."""
    import pyarrow as pa

    columns = [
        table.column(field.name)
        if field.name in table.schema.names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    if not cast:
        return pa.table(columns, names=schema.names)
    typed = [column.cast(field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.table(typed, schema=schema)


def datasets_source(
    name: str, *, split: str, subset: str | None, revision: str | None
) -> TableSource:
    """A directory that `datasets` wrote or can read, or a data set on the hub, streamed.

    `revision` pins what a hub name stands for; None means as it is now. Raises DataError.
    """
    path = Path(name)
    saved = _is_saved(path)
    try:
        if saved:
            data = _load_saved(path, split)
        else:
            revision = revision or (None if path.exists() else _current_revision(name))
            data = _load_streaming(name, split, subset, revision)
            if data.features is None:  # a stream of a format that does not state them
                data = data._resolve_features()
    except Exception as error:  # whatever the loaders of a hundred formats stumble over
        raise _unloadable(name, f"as split {split!r}", error) from error
    schema = data.features.arrow_schema

    def read(columns: Sequence[str] | None) -> Iterator[tuple[str, Any]]:
        view = data if columns is None else data.select_columns(list(columns))
        wanted = schema if columns is None else view.features.arrow_schema
        chunks = view.with_format("arrow").iter(batch_size=CHUNK_ROWS)
        for table in _named(name, (_fitted(chunk, wanted, cast=True) for chunk in chunks)):
            yield name, table

    content = hash_tree(path) if path.is_dir() else f"{name}@{revision}"
    return TableSource(
        read,
        schema,
        count=len(data) if saved else None,
        stem=path.name,
        fingerprint=json.dumps([content, split, subset]),
        revision=revision,
    )


def split_names(name: str, subset: str | None) -> list[str]:
    """Of what `datasets_source` can open. Raises DataError."""
    from datasets import DatasetDict, get_dataset_split_names, load_from_disk

    path = Path(name)
    try:
        if not _is_saved(path):
            return list(get_dataset_split_names(name, subset))
        data = load_from_disk(str(path))
    except Exception as error:  # as above
        raise _unloadable(name, "with its splits", error) from error
    return list(data) if isinstance(data, DatasetDict) else ["train"]


def _is_saved(path: Path) -> bool:
    return any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json"))


def _named(name: str, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same; whatever `datasets` stumbles over on its way becomes a DataError."""
    read = 0
    while True:
        try:
            table = next(tables, None)
        except Exception as error:
            raise DataError(
                f"{name}: somewhere after {read:,} rows `datasets` cannot read on "
                f"({type(error).__name__}: {error}). {_WAY_OUT}"
            ) from error
        if table is None:
            return
        read += table.num_rows
        yield table


def _unloadable(name: str, what: str, error: Exception) -> DataError:
    return DataError(
        f"{name}: neither a .jsonl or .parquet file nor anything that `datasets` can load {what}: "
        f"{type(error).__name__}: {error}. {_WAY_OUT}"
    )


def hash_tree(path: Path) -> str:
    return hash_files(sorted(p for p in path.rglob("*") if p.is_file()))


def _load_saved(path: Path, split: str) -> Any:
    from datasets import DatasetDict, load_from_disk

    data = load_from_disk(str(path))
    return data[split] if isinstance(data, DatasetDict) else data


def _load_streaming(name: str, split: str, subset: str | None, revision: str | None) -> Any:
    from datasets import load_dataset

    return load_dataset(name, subset, split=split, revision=revision, streaming=True)


def _current_revision(name: str) -> str:
    from huggingface_hub import HfApi

    return str(HfApi().dataset_info(name).sha)
