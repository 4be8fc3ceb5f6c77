"""metrics.jsonl: one JSON object per line, appended by the driver, readable while it grows."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from posttrain.errors import DataError

AGAIN = "again"
"""The event of a stage that runs again because its settings have changed."""


class MetricSink(Protocol):
    """Gets every record that metrics.jsonl gets."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """Appends records to `path`; each is on its way to disk when `append` returns. `sinks` get
    them too, and are closed with it.

    A line that a killed writer left unfinished is cut off, so that the file stays valid.
    """

    def __init__(self, path: Path, sinks: Sequence[MetricSink] = ()) -> None:
        _cut_torn_line(path)
        self._file = path.open("a", encoding="utf-8")
        self._sinks = sinks

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record. Numbers that are not finite become null, their keys are listed under
        `non_finite`; numpy scalars become plain numbers. TypeError for what JSON cannot hold."""
        self._file.write(json.dumps(to_json(record), allow_nan=False) + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        self._file.close()
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(
    path: Path, on_bad_line: Callable[[DataError], None] | None = None
) -> list[dict[str, Any]]:
    """All whole records, oldest first; a last line still being written is left out.

    A resumed run has some steps twice: the later record is the one that counts. What a stage
    recorded before it ran again with other settings counts no more and is left out. DataError names
    the line that is no JSON object; with `on_bad_line` it is handed there and the line left out.
    """
    records: list[dict[str, Any]] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                break
            try:
                record = _record(line, f"{path}:{number}")
            except DataError as error:
                if on_bad_line is None:
                    raise
                on_bad_line(error)
                continue
            if record.get("event") == AGAIN:
                records = [r for r in records if r.get("stage") != record["stage"]]
            records.append(record)
    return records


def surviving(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Records in order, without those that a resumed attempt did again or went back behind.

    An attempt that resumes from step N records N+1 next: whatever the earlier attempt recorded of
    its own steps beyond N is off the lineage, whether it has been reached again yet or not. So is
    a re-screening that ended after step N was recorded: the checkpoint knows nothing of it.
    """
    kept: list[Mapping[str, Any]] = []
    reached: dict[str, tuple[int, Any]] = {}
    for record in records:
        stage, step, attempt = record.get("stage"), record.get("step"), record.get("attempt")
        if isinstance(stage, str) and step is not None and "event" not in record:
            last_step, last_attempt = reached.get(stage, (0, attempt))
            # A trainer may log twice at one step; an attempt never records a step twice.
            if step < last_step or attempt != last_attempt:
                kept = _upto(kept, stage, step - 1, attempt)
            reached[stage] = step, attempt
        kept.append(record)
    return kept


def _upto(
    records: Iterable[Mapping[str, Any]], stage: str, last_step: int, attempt: Any
) -> list[Mapping[str, Any]]:
    """Without what `stage` recorded beyond its checkpoint of `last_step` before `attempt`, whose
    own events may come before its first step."""
    held: list[Mapping[str, Any]] = []
    reached = 0
    for record in records:
        if record.get("stage") == stage and (
            "event" not in record or record.get("attempt") != attempt
        ):
            step = record.get("step", 0)
            late = record.get("event") == "rescreen" and reached >= last_step
            if step > last_step or late:
                continue
            if "event" not in record:
                reached = max(reached, step)
        held.append(record)
    return held


def _record(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is no JSON ({error}); remove the line") from error
    if not isinstance(record, dict):
        raise DataError(f"{place} is no JSON object; remove the line")
    return record


def to_json(record: Mapping[str, Any]) -> dict[str, Any]:
    """`record` with numbers that JSON has no word for as None and `non_finite` naming them, by
    dotted key: {"loss": nan} gives {"loss": None, "non_finite": ["loss"]}."""
    non_finite: list[str] = []

    def convert(value: Any, key: str) -> Any:
        if isinstance(value, Mapping):
            return {k: convert(v, f"{key}.{k}" if key else str(k)) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [convert(v, f"{key}.{i}") for i, v in enumerate(value)]
        if isinstance(value, bool):
            return value
        if isinstance(value, Integral):
            return int(value)
        if isinstance(value, Real):
            number = float(value)
            if math.isfinite(number):
                return number
            non_finite.append(key)
            return None
        return value

    converted: dict[str, Any] = convert(record, "")
    return {**converted, "non_finite": non_finite} if non_finite else converted


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        keep = end
        while keep > 0:
            start = max(0, keep - 65536)
            file.seek(start)
            newline = file.read(keep - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep < end:
            file.truncate(keep)
