"""How rows become tasks for each way of judging."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.prune.columns import (
    ColumnSettings,
    Task,
    UnusableRow,
    checkable_task,
    graded_task,
)
from posttrain.prune.encoding import Encoding
from posttrain.prune.intake import MakeReader, Reader
from posttrain.prune.settings import PruneSettings


def make_reader(settings: PruneSettings, encoding: Encoding) -> MakeReader:
    def make(columns: ColumnSettings, stem: str) -> Reader:
        def checkable(record: Mapping[str, Any]) -> Task:
            return checkable_task(record, columns, stem, settings.rewards)

        def graded(record: Mapping[str, Any]) -> Task:
            task = graded_task(record, columns, stem)
            if settings.method == "ifd" and len(encoding.answer(task)) < 2:
                raise UnusableRow("an answer of one token: IFD needs two")
            return task

        return Reader(
            make=checkable if settings.method == "critic" else graded,
            num_tokens=encoding.length,
            room=encoding.room,
        )

    return make
