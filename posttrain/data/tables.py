"""Rows of CSV files and of directories of them as they stand there; of Parquet files, other data
set directories and data sets of the hub by `datasets`."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain.data.json_lines import MAX_LINE_BYTES
from posttrain.errors import DataError

CSV = ".csv"
BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
FILE_SUFFIXES = (
    CSV,
    *BUILDERS,
    ".jsonl",
    ".ndjson",
    ".json",
    ".txt",
    ".tsv",
    ".gz",
    ".zst",
    ".yaml",
)


def is_table(source: str) -> bool:
    """Whether `read_table` reads it: not a file of JSON lines, nor a path that leads nowhere."""
    path = Path(source)
    if path.exists():
        return path.is_dir() or path.suffix in (CSV, *BUILDERS)
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
    table = [source] if _is_csv(source) else _load(source, subset)
    if isinstance(table, dict):
        table = table[_split(source, split, list(table))]
    if isinstance(table, list):
        table = itertools.chain.from_iterable(map(_read_csv, table))
    yield from enumerate(table, start=1)


def _load(source: str, subset: str | None) -> Any:
    """A table of `datasets`, or several by the names of their splits; of a directory of CSV files
    the files of each split."""
    from datasets import load_dataset, load_dataset_builder, load_from_disk

    path = Path(source)
    try:
        if path.is_file():
            return load_dataset(BUILDERS[path.suffix], data_files=source)
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return load_from_disk(source)
        if path.is_dir():
            files = load_dataset_builder(source, subset).config.data_files
            if files and all(map(_is_csv, itertools.chain(*files.values()))):
                return {str(split): list(paths) for split, paths in files.items()}
        return load_dataset(source, subset)
    except Exception as error:  # its own, those of parsers, and those of the network
        raise DataError(
            f"{source} is neither a file nor a data set that can be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error


def _is_csv(source: str) -> bool:
    path = Path(source)
    return path.suffix == CSV and path.is_file()


def _read_csv(source: str) -> Iterator[Mapping[str, str | None]]:
    """All text, and None where nothing stands: who guesses types makes 101 of 0101, and of an
    answer in digits no text, which verifiers want."""
    path = Path(source)
    number = 0
    csv.field_size_limit(MAX_LINE_BYTES)  # a program's tests take more than its 128 KiB
    try:
        with path.open("rb") as file:
            # Line by line, so that the row is known whose bytes are no text.
            lines = (line.decode("utf-8-sig") for line in file)
            # Spreadsheets write empty rows over the header, and columns without a name.
            filled = itertools.dropwhile(lambda line: not line.strip(" ,\r\n"), lines)
            reader = csv.DictReader(filled, strict=True)
            names = reader.fieldnames or []
            named = [name for name in names if name]
            if len(set(named)) < len(named):
                raise DataError(f"{path}: two columns have one name: {', '.join(named)}")
            for number, row in enumerate(reader, start=1):
                if None in row:
                    raise DataError(
                        f"{path}, row {number}: more fields than the header's {len(names)}; a text "
                        "with a comma in it stands in quotes"
                    )
                yield {name: value or None for name, value in row.items() if name}
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, row {number + 1}: no UTF-8 text ({error})") from error
    except csv.Error as error:
        raise DataError(f"{path}, row {number + 1}: no CSV ({error})") from error


def _split(source: str, wanted: str | None, there: list[str]) -> str:
    if wanted is None and len(there) == 1:
        return there[0]
    if wanted not in there:
        asked = "several splits; name one" if wanted is None else f"no split {wanted!r}"
        raise DataError(f"{source} has {asked} as `split`: {', '.join(there)}")
    return wanted
