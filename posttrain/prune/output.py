"""The second pass over a source: kept rows as they were, and every row beside what was decided."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from judges.selection import RULES
from posttrain.errors import DataError
from posttrain.prune.decisions import LABELS, Decisions, Reasons, interval
from posttrain.prune.settings import PruneSettings
from posttrain.prune.shards import LineShards, ParquetShards
from posttrain.prune.source import Source
from posttrain.prune.store import Store, TaskTable

if TYPE_CHECKING:
    import pyarrow as pa

PREFIX = "prune_"
"""Of our columns: a source that has such a one is not taken in."""
QUARANTINED, HELD_OUT = -1, -2
"""In place of a task's index: rows that no critic has judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTable:
    """Arrays over the rows of the source, taken or not. `task` is the index of a row's task in a
    `TaskTable`, `QUARANTINED` or `HELD_OUT`; rows that are not `readable` (or were not taken)
    are in no table. `notes` says for quarantined and held-out rows why."""

    task: NDArray[np.int32]
    readable: NDArray[np.bool_]
    notes: Mapping[int, str]


def row_table(store: Store, tasks: TaskTable) -> RowTable:
    index = np.full(int(tasks.key.max(initial=0)) + 1, QUARANTINED, dtype=np.int32)
    index[tasks.key] = np.arange(len(tasks))
    total = store.num_rows()
    task = np.full(total, QUARANTINED, dtype=np.int32)
    readable = np.zeros(total, dtype=bool)
    for row, key, _ in store.row_tasks():
        readable[row] = True
        if key is not None and key < len(index):
            task[row] = index[key]
    notes: dict[int, str] = {}
    for row, other, drops, shared in store.overlaps():
        if drops:
            task[row] = HELD_OUT
            notes.setdefault(row, f"shares {shared!r} with {other}")
    for row, is_readable, details in store.quarantined():
        readable[row] = is_readable
        if is_readable:
            notes[row] = sys.intern(details["reason"])  # mostly the same, and may be of millions
    return RowTable(task=task, readable=readable, notes=notes)


class Annotator:
    """The columns that say what was decided about rows."""

    def __init__(
        self,
        store: Store,
        tasks: TaskTable,
        rows: RowTable,
        decided: Decisions,
        settings: PruneSettings,
    ) -> None:
        self._store = store
        self._tasks = tasks
        self._rows = rows
        self._decided = decided
        self._selection = settings.selection
        self._reasons = Reasons(tasks, decided, settings)

    def columns(self, numbers: NDArray[np.int64]) -> dict[str, pa.Array]:
        """For the rows of these numbers `[M]`, by name."""
        import pyarrow as pa

        task = self._rows.task[numbers]
        judged = task >= 0
        at = np.maximum(task, 0)
        decided, scored, correct = self._decided, self._tasks.scored[at], self._tasks.correct[at]

        def known(values: Any, kind: Any = None) -> pa.Array:
            """Of the judged; `values` `[M]` has something for the others too."""
            absent = ~judged
            if isinstance(values, np.ndarray) and values.dtype.kind == "f":
                absent = absent | np.isnan(values)
            return pa.array(values, kind, mask=absent)

        rule = np.where(judged, decided.rule[at], len(RULES) - 1 - task)
        kept = judged & decided.kept[at]
        label = decided.label[at]
        low, high = interval(scored, correct, self._selection)
        columns = {
            "row": pa.array(numbers + 1),
            "id": known(self._store.task_ids(self._tasks.key[at]), pa.string()),
            "action": _words(
                ("keep", "drop", "quarantined"), np.select([kept, task != QUARANTINED], [0, 1], 2)
            ),
            "rule": _words((*RULES, "quarantined", "held_out"), rule),
            "reason": self._reason(numbers, task),
            "label": _words(LABELS, label, absent=~judged | (label < 0)),
            "value": known(decided.value[at]),
            "low": known(low),
            "high": known(high),
            "samples": known(scored, pa.int64()),
            "correct": known(correct, pa.int64()),
            "undecided": known(decided.undecided[at]),
        }
        return {PREFIX + name: values for name, values in columns.items()}

    def _reason(self, numbers: NDArray[np.int64], task: NDArray[np.int32]) -> pa.Array:
        import pyarrow as pa

        texts = self._reasons.of(np.maximum(task, 0))
        others = task < 0
        if not others.any():
            return texts
        notes = [self._rows.notes[int(n)] for n in numbers[others]]
        return pa.compute.replace_with_mask(texts, pa.array(others), pa.array(notes, pa.string()))


def _words(
    words: Sequence[str], codes: NDArray[Any], absent: NDArray[np.bool_] | None = None
) -> pa.Array:
    import pyarrow as pa

    return pa.array(list(words), pa.string()).take(pa.array(codes, mask=absent))


def write_rows(
    directory: Path,
    source: Source,
    rows: RowTable,
    annotator: Annotator,
    kept: NDArray[np.bool_],
    *,
    form: Literal["parquet", "jsonl"],
) -> None:
    """`kept` `[tasks]` rows into `directory`/kept, all that can be read into `directory`/annotated,
    both in the order of the source, which has no columns of our names. Raises DataError for a
    source that changed, or that cannot be written in this format."""

    def is_kept(numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        task = rows.task[numbers]
        chosen: NDArray[np.bool_] = (task >= 0) & kept[np.maximum(task, 0)]
        return chosen

    write = _write_lines if form == "jsonl" else _write_tables
    written = write(directory, source, rows.readable, annotator, is_kept)
    if written != rows.readable.sum():
        raise DataError("the source has other rows than when it was taken in: it was changed")


def _write_tables(
    directory: Path,
    source: Source,
    readable: NDArray[np.bool_],
    annotator: Annotator,
    is_kept: Callable[[NDArray[np.int64]], NDArray[np.bool_]],
) -> int:
    import pyarrow as pa

    schema = source.schema()
    extended = _extended(schema, annotator.columns(np.flatnonzero(readable)[:1]))
    written = 0
    with (
        ParquetShards(directory / "kept", schema) as kept,
        ParquetShards(directory / "annotated", extended) as annotated,
    ):
        for numbers, table in source.tables(readable):
            written += len(numbers)
            kept.write(table.filter(pa.array(is_kept(numbers))))
            beside = annotator.columns(numbers)
            annotated.write(pa.table([*table.columns, *beside.values()], schema=extended))
    return written


def _write_lines(
    directory: Path,
    source: Source,
    readable: NDArray[np.bool_],
    annotator: Annotator,
    is_kept: Callable[[NDArray[np.int64]], NDArray[np.bool_]],
) -> int:
    import pyarrow as pa

    written = 0
    with LineShards(directory / "kept") as kept, LineShards(directory / "annotated") as annotated:
        for numbers, lines in source.lines(readable):
            written += len(numbers)
            kept.write([lines[i] for i in np.flatnonzero(is_kept(numbers))])
            beside = pa.table(annotator.columns(numbers)).to_pylist()
            annotated.write(
                [
                    json.dumps({**json.loads(line), **notes}, ensure_ascii=False)
                    for line, notes in zip(lines, beside, strict=True)
                ]
            )
    return written


def _extended(schema: pa.Schema, columns: Mapping[str, pa.Array]) -> pa.Schema:
    """With our columns, also in the description that `datasets` leaves in a schema."""
    import pyarrow as pa

    for name, values in columns.items():
        schema = schema.append(pa.field(name, values.type))
    notes = dict(schema.metadata or {})
    if b"huggingface" in notes:
        described = json.loads(notes[b"huggingface"])
        features = described.get("info", {}).get("features", {})
        for name, values in columns.items():
            features[name] = {"dtype": str(values.type), "_type": "Value"}
        notes[b"huggingface"] = json.dumps(described).encode()
    return schema.with_metadata(notes)
