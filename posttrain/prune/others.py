"""Other sets that rows are compared with: held-out tasks, and the sets of RL and DPO."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from posttrain.data.overlap import TextIndex
from posttrain.errors import DataError
from posttrain.prune.columns import ColumnSettings, Task, UnusableRow, conversation
from posttrain.prune.settings import OverlapSettings
from posttrain.prune.source import Source, open_source


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherSet:
    """`drops`: the set is held out, so that a row which shares text with it goes."""

    name: str
    index: TextIndex
    drops: bool


class OtherSets:
    """The sets that the settings name, opened; read when they are needed."""

    def __init__(self, settings: OverlapSettings) -> None:
        self._words = settings.words
        named = [(name, True) for name in settings.held_out]
        named += [(name, False) for name in settings.compare]
        self._sources = [(name, drops, open_source(name, one_table=False)) for name, drops in named]

    @property
    def fingerprints(self) -> list[list[str | bool | int]]:
        return [[s.fingerprint, drops, self._words] for _, drops, s in self._sources]

    def read(self) -> list[OtherSet]:
        """Raises DataError for a set with a row that has no prompt: what is not known to be held
        out cannot be kept out."""
        return [
            OtherSet(name=name, index=TextIndex(_prompts(name, source), self._words), drops=drops)
            for name, drops, source in self._sources
        ]


def _prompts(name: str, source: Source) -> Iterator[str]:
    columns = ColumnSettings().resolve(source.columns)
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
