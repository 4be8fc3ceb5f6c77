"""Rows of Parquet and CSV files, data set directories and data sets of the hub, by `datasets`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import DataError

BUILDERS = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
FILE_SUFFIXES = (*BUILDERS, ".jsonl", ".ndjson", ".json", ".txt", ".tsv", ".gz", ".zst", ".yaml")


def is_table(source: str) -> bool:
    """Whether `datasets` reads it: not a file of JSON lines, nor a path that leads nowhere."""
    path = Path(source)
    if path.exists():
        return path.is_dir() or path.suffix in BUILDERS
    # A hub name is `owner/name`, and may have dots; what looks like a path was meant as one.
    is_file = path.suffix.lower() in FILE_SUFFIXES
    return source.count("/") == 1 and source[0] not in "./~" and not is_file


def read_table(
    source: str, *, subset: str | None, split: str | None
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(row number from 1, row); `split` is needed where there are several.

    Raises:
        DataError: it cannot be loaded; says why, and which splits or subsets there are.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk

    path = Path(source)
    try:
        if path.is_file():
            table: Any = load_dataset(BUILDERS[path.suffix], data_files=source)
        elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            table = load_from_disk(source)
        else:
            table = load_dataset(source, subset)
    except Exception as error:  # its own, those of parsers, and those of the network
        raise DataError(
            f"{source} is neither a file nor a data set that can be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    if isinstance(table, DatasetDict):
        table = table[_split(source, split, list(table))]
    yield from enumerate(table, start=1)


def _split(source: str, wanted: str | None, there: list[str]) -> str:
    if wanted is None and len(there) == 1:
        return there[0]
    if wanted not in there:
        asked = "several splits; name one" if wanted is None else f"no split {wanted!r}"
        raise DataError(f"{source} has {asked} as `split`: {', '.join(there)}")
    return wanted
