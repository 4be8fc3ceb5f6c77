"""Other sets that rows are compared with: held-out tasks, and the sets of RL and DPO."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.overlap import TextIndex
from posttrain.errors import DataError
from posttrain.prune.columns import ColumnSettings, Task, UnusableRow, conversation
from posttrain.prune.settings import OtherChoice, OverlapSettings
from posttrain.prune.source import Source, open_splits

Splits = list[tuple[Source, ColumnSettings]]
"""Of one set, each with the columns that are read of it: they need not be the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherSet:
    """`drops`: the set is held out, so that a row which shares text with it goes."""

    name: str
    index: TextIndex
    drops: bool


class OtherSets:
    """The sets that the settings name, opened; read when they are needed."""

    def __init__(self, settings: OverlapSettings) -> None:
        """Raises DataError for a set that cannot be opened, or in which no column holds a prompt:
        what is not known to be held out cannot be kept out."""
        self._words = settings.words
        named = [(choice, True) for choice in settings.held_out]
        named += [(choice, False) for choice in settings.compare]
        self._sets = [(choice.name, drops, _opened(choice)) for choice, drops in named]

    @property
    def fingerprints(self) -> list[list[Any]]:
        """Of what is read of each set, all its splits, and to what end."""
        return [
            [[[s.fingerprint, columns.model_dump()] for s, columns in splits], drops, self._words]
            for _, drops, splits in self._sets
        ]

    def read(self) -> list[OtherSet]:
        """Raises DataError for a set with a row that has no prompt."""
        return [
            OtherSet(name=name, index=TextIndex(_prompts(name, splits), self._words), drops=drops)
            for name, drops, splits in self._sets
        ]


def _opened(choice: OtherChoice) -> Splits:
    splits = open_splits(choice.path, split=choice.split, subset=choice.subset)
    setting = f"overlap, {choice.path}: columns"
    return [(source, choice.columns.resolve(source.columns, setting)) for source in splits]


def _prompts(name: str, splits: Splits) -> Iterator[str]:
    for source, columns in splits:
        for row in source.rows(None, columns.names()):
            try:
                if row.record is None:
                    raise UnusableRow(row.problem)
                messages, _ = conversation(row.record, columns)
            except UnusableRow as problem:
                raise DataError(f"{name}, row {row.place}: {problem}") from problem
            yield from (message.content for message in messages if message.role == "user")


def overlaps(task: Task, others: Sequence[OtherSet]) -> Iterator[tuple[OtherSet, str]]:
    """The sets that a task shares text with, each with the words; its own answer counts too."""
    texts = [message.content for message in task.prompt.messages]
    if task.completion is not None:
        texts.append(task.completion)
    for other in others:
        shared = next((s for text in texts if (s := other.index.shared(text)) is not None), None)
        if shared is not None:
            yield other, shared
