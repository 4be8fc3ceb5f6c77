"""The first pass over a source: tasks go into the store, what cannot be used into quarantine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.errors import DataError, ModelError
from posttrain.progress import say
from posttrain.prune.columns import ColumnSettings, Task, UnusableRow
from posttrain.prune.others import OtherSet, OtherSets, overlaps
from posttrain.prune.output import PREFIX
from posttrain.prune.settings import PruneSettings, SourceChoice
from posttrain.prune.shards import check_parquet
from posttrain.prune.source import Row, Source, open_source
from posttrain.prune.store import Store

READING = 2
"""Goes up where the same rows would be taken in otherwise than before: they are read again."""
BATCH_ROWS = 1000
SAY_EVERY_S = 10.0
SHOWN_CHARACTERS = 2000
"""Of a row in quarantine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """How a row becomes a task, and how much of it is shown. `num_tokens` raises ModelError for
    what the critic's template cannot render; `room` is the most that fits."""

    make: Callable[[Mapping[str, Any]], Task]
    num_tokens: Callable[[Task], int]
    room: int


MakeReader = Callable[[ColumnSettings, str], Reader]
"""For the columns that there are, and the domain of rows without one."""


def take_in(store: Store, settings: PruneSettings, make_reader: MakeReader) -> Source:
    """The source, opened. Its rows are read into the store unless they are there: if the source,
    or what is read of it, has changed, they replace the old ones. What was judged stays, and rows
    that were set aside because no answer could be scored are open again.

    Raises DataError if the source cannot be opened, has a column that would be called like one of
    ours or that the format does not have, or no row can be used, or with `strict` at the first that
    cannot.
    """
    choice = settings.source
    before = store.meta("intake") or {}
    pinned = before.get("revision") if before.get("path") == choice.path else None
    source = _opened(settings, pinned)
    _refuse_ours(source.columns, "the source")
    columns = choice.columns.resolve(source.columns)
    others = OtherSets(settings.overlap)
    reader = make_reader(columns, source.stem)
    signature = {
        "path": choice.path,
        "fingerprint": source.fingerprint,
        "revision": source.revision,
        "rows": [choice.limit, choice.sample, settings.seed if choice.sample else None],
        "columns": columns.model_dump(),
        "overlap": others.fingerprints,
        "room": reader.room,
        "strict": settings.strict,
        "format": settings.format,
        "reading": READING,
    }
    if before == signature:
        store.take_back()
        source.restore(_read_schema(store))
        return source
    say(f"prune: reading {choice.path}, columns {', '.join(columns.names())}")
    wanted = _wanted_rows(source, choice, settings.seed)
    with store.transaction():
        _replace_rows(
            store, source, source.rows(wanted, columns.names()), reader, others.read(), settings
        )
        if settings.format == "parquet":
            check_parquet(source.schema())
        store.set_meta("schema", source.schema().serialize().to_pybytes().hex())
        store.set_meta("intake", signature)
    return source


def check_unchanged(source: Source, settings: PruneSettings) -> None:
    """Raises DataError if the files lie there with another content than was taken in. A name on the
    hub is pinned."""
    if source.revision is not None:
        return
    if _opened(settings, None).fingerprint != source.fingerprint:
        raise DataError(
            f"{settings.source.path} was changed after it was taken in, so nothing was written."
            " Start the same command again: it takes the source in as it is then, and asks only"
            " what is not known yet"
        )


def _opened(settings: PruneSettings, revision: str | None) -> Source:
    choice = settings.source
    return open_source(
        choice.path,
        split=choice.split,
        subset=choice.subset,
        revision=revision,
        one_table=settings.format == "parquet",
    )


def _replace_rows(
    store: Store,
    source: Source,
    rows: Iterable[Row],
    reader: Reader,
    others: Sequence[OtherSet],
    settings: PruneSettings,
) -> None:
    batch: list[tuple[int, Task]] = []
    store.clear_rows()
    said = time.monotonic()
    for row in rows:
        if time.monotonic() - said > SAY_EVERY_S:
            said = time.monotonic()
            say(f"prune: {row.number:,} rows read")
        if row.record is not None:  # rows of JSON may have columns that the first do not
            _refuse_ours(row.record, f"{row.file}, row {row.place}")
        try:
            task = _task(row, reader)
        except UnusableRow as problem:
            _quarantine(store, row, str(problem), source.stem, strict=settings.strict)
            continue
        batch.append((row.number, task))
        for other, shared in overlaps(task, others):
            store.add_overlap(row.number, other.name, shared, drops=other.drops)
        if len(batch) == BATCH_ROWS:
            store.add_rows(batch)
            batch.clear()
    store.add_rows(batch)
    if not store.has_tasks():
        raise DataError(_nothing_left(store, source))


def _refuse_ours(columns: Iterable[str], place: str) -> None:
    """Beside them ours could not be written, and that would show after all has been judged."""
    for name in columns:
        if name.startswith(PREFIX):
            raise DataError(f"{place} already has the column {name!r}: rename or remove it")


def _wanted_rows(source: Source, choice: SourceChoice, seed: int) -> NDArray[np.bool_] | None:
    """Which rows are taken, up to the last of them; None: all."""
    if choice.limit is not None:
        return np.broadcast_to(np.True_, choice.limit)
    if choice.sample is None:
        return None
    wanted = np.zeros(source.count(), dtype=bool)
    size = min(choice.sample, len(wanted))
    wanted[np.random.default_rng(seed).choice(len(wanted), size, replace=False)] = True
    return wanted


def _task(row: Row, reader: Reader) -> Task:
    if row.record is None:
        assert row.problem is not None
        raise UnusableRow(row.problem)
    task = reader.make(row.record)
    try:
        length = reader.num_tokens(task)
    except ModelError as error:
        raise UnusableRow(str(error).removeprefix("policy.model: ")) from error
    if length > reader.room:
        raise UnusableRow(f"{length} tokens are too many; {reader.room} fit into critic.max_length")
    return task


def _quarantine(store: Store, row: Row, problem: str, domain: str, *, strict: bool) -> None:
    if strict:
        raise DataError(f"{row.file}, row {row.place}: {problem}")
    readable = row.record is not None
    details: dict[str, Any] = {"file": row.file, "row": row.place, "reason": problem}
    if row.offset is not None:
        details |= {"offset": row.offset, "bytes": row.length}
    details["content"] = _shown(row)
    store.add_quarantined(row.number, domain, details, readable=readable)


def _shown(row: Row) -> Any:
    """What stands there; of what is long its beginning as text: the rest is where the row is."""
    if row.record is None or row.content:
        return row.content[:SHOWN_CHARACTERS] or None
    text = json.dumps(dict(row.record), ensure_ascii=False, default=str)
    return dict(row.record) if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS]


def _nothing_left(store: Store, source: Source) -> str:
    first = next(store.quarantined(), None)
    if first is None:
        return f"{source.stem} has no rows, or all of them are held out"
    reason, (_, quarantined) = first[2]["reason"], store.counts()
    return f"none of {quarantined} rows of {source.stem} can be used; the first: {reason}"


def _read_schema(store: Store) -> Any:
    import pyarrow as pa

    return pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(store.meta("schema"))))
