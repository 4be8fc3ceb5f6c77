"""Where tasks and supervised rows come from: the starter, reasoning-gym, files, or the hub.

A task has `question`, `answer`, and optionally `domain` and `verifier`; a supervised row has
`question`, `completion` and optionally `answer`, `domain`, `verifier`, `system`. Columns that are
called otherwise are named in `columns`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from posttrain.data.gym import gym_prompts
from posttrain.data.json_lines import MalformedLine, parse_object, read_lines
from posttrain.data.prompts import Split, column_reference, make_prompt
from posttrain.data.tables import is_table, read_table
from posttrain.errors import DataError
from posttrain.types import Prompt, SFTRow

STARTER = "starter"
REASONING_GYM = "reasoning_gym"


# fmt: off
Column = Literal[
    "question", "answer", "completion", "domain", "verifier", "system",
    "prompt", "chosen", "rejected",
]
# fmt: on


class SourceSettings(BaseModel):
    """`source` is `starter`, `reasoning_gym`, a file (JSON lines, Parquet, CSV), a directory of a
    data set, or a name on the hub, of which `subset` and `split` say more. `size` cuts it, or says
    how many tasks are made; `seed` is that of what is made. `family` and its `settings` are
    reasoning-gym's.

    `columns` gives the source's names for ours. With `answer_after` the answer is what stands
    behind the last occurrence of that text, as in GSM8K's `… #### 72`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(min_length=1)
    subset: str | None = None
    split: str | None = None
    size: int | None = Field(default=None, gt=0)
    seed: int = 0
    columns: dict[Column, str] = {}
    answer_after: str | None = Field(default=None, min_length=1)
    family: str | None = Field(default=None, min_length=1)
    settings: dict[str, Any] = {}

    @model_validator(mode="after")
    def _family_belongs_to_reasoning_gym(self) -> Self:
        if self.source == REASONING_GYM and self.family is None:
            raise ValueError("source: reasoning_gym needs a family, for example chain_sum")
        if self.source != REASONING_GYM and (self.family is not None or self.settings):
            raise ValueError(f"family and settings are reasoning_gym's, not those of {self.source}")
        return self


def load_prompts(sources: Sequence[SourceSettings], split: Split) -> list[Prompt]:
    """The prompts of all sources, each once.

    Raises:
        DataError: a source is missing, empty or has a malformed row (named by number), or two
            rows ask the same with different answers.
    """
    prompts: dict[str, Prompt] = {}
    for settings in sources:
        for prompt in _prompts(settings, split):
            known = prompts.setdefault(prompt.prompt_id, prompt)
            if known.reference != prompt.reference:
                raise DataError(
                    f"{settings.source}: the question {prompt.messages[-1].content!r} has two "
                    f"answers, {known.reference!r} and {prompt.reference!r}"
                )
    if not prompts:
        raise DataError(f"tasks.{split}: no tasks in {[s.source for s in sources]}")
    return list(prompts.values())


def load_sft_rows(settings: SourceSettings) -> list[SFTRow]:
    """Supervised rows. Raises DataError as `load_prompts` does."""
    if settings.source == STARTER:
        from posttrain.starter.tasks import starter_sft_rows

        return starter_sft_rows(_size(settings), settings.seed)
    if settings.source == REASONING_GYM:
        raise DataError("sft.data: reasoning_gym has questions and answers, but no completions")
    rows = []
    for number, record in read_records(settings):
        place = _place(settings, number)
        rows.append(
            SFTRow(
                row_id=f"{Path(settings.source).name}:{number}",
                prompt=_prompt(record, settings.source, place),
                completion=_text(record, "completion", place),
                system=_optional_text(record, "system", place),
            )
        )
    if not rows:
        raise DataError(f"sft.data: {settings.source} has no rows")
    return rows


def _prompts(settings: SourceSettings, split: Split) -> list[Prompt]:
    if settings.source == STARTER:
        from posttrain.starter.tasks import starter_prompts

        return starter_prompts(split, _size(settings), settings.seed)
    if settings.family is not None:
        return gym_prompts(
            settings.family, settings.settings, split, _size(settings), settings.seed
        )
    prompts = []
    for number, record in read_records(settings):
        place = _place(settings, number)
        if record.get("answer") is None:
            raise DataError(f"{place}: column 'answer' is missing. Columns there: {sorted(record)}")
        prompts.append(_prompt(record, settings.source, place))
    return prompts


def _size(settings: SourceSettings) -> int:
    if settings.size is None:
        raise DataError(
            f"the source {settings.source!r} makes as many tasks as wanted: give it a size"
        )
    return settings.size


def read_records(settings: SourceSettings) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(number from 1, row with our names for its columns). Raises DataError, naming source and
    line."""
    table = is_table(settings.source)
    rows = (
        read_table(settings.source, subset=settings.subset, split=settings.split)
        if table
        else _read_lines(settings.source)
    )
    for number, row in itertools.islice(rows, settings.size):
        renamed = dict(row)
        for ours, theirs in settings.columns.items():
            if theirs not in row:
                raise DataError(
                    f"{_place(settings, number)}: column {theirs!r}, the {ours!r} of `columns`, is "
                    f"missing. Columns there: {sorted(row)}"
                )
            renamed[ours] = row[theirs]
        if table and "answer" in renamed:
            renamed["answer"] = column_reference(renamed["answer"])
        if settings.answer_after is not None and renamed.get("answer") is not None:
            renamed["answer"] = _answer(
                renamed["answer"], settings.answer_after, _place(settings, number)
            )
        yield number, renamed


def _answer(whole: object, mark: str, place: str) -> str:
    _, found, answer = str(whole).rpartition(mark)
    if not found or not answer.strip():
        raise DataError(f"{place}: nothing stands behind {mark!r} in the answer {whole!r}")
    return answer.strip()


def _place(settings: SourceSettings, number: int) -> str:
    return f"{settings.source}, {'row' if is_table(settings.source) else 'line'} {number}"


def _read_lines(source: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    path = Path(source)
    if not path.is_file():
        raise DataError(
            f"{source} is no file. A source is 'starter', 'reasoning_gym', a file (JSON lines, "
            "Parquet, CSV), the directory of a data set, or a name on the hub."
        )
    for line in read_lines(path):
        try:
            _, record = parse_object(line)
        except MalformedLine as error:
            raise DataError(f"{path}, line {line.number}: {error}") from error
        yield line.number, record


def _prompt(record: Mapping[str, Any], source: str, place: str) -> Prompt:
    verifier = _optional_text(record, "verifier", place)
    return make_prompt(
        _text(record, "question", place),
        reference=record.get("answer"),
        domain=_optional_text(record, "domain", place) or _stem(Path(source)),
        metadata={} if verifier is None else {"verifier": verifier},
    )


def _stem(path: Path) -> str:
    """What follows the last dot of a name on the hub is no suffix."""
    return path.stem if path.exists() else path.name


def _text(record: Mapping[str, Any], column: str, place: str) -> str:
    value = _optional_text(record, column, place)
    if value is None:
        raise DataError(f"{place}: column {column!r} is missing. Columns there: {sorted(record)}")
    return value


def _optional_text(record: Mapping[str, Any], column: str, place: str) -> str | None:
    value = record.get(column)
    if value is not None and (not isinstance(value, str) or not value):
        raise DataError(
            f"{place}: column {column!r} must be a text that is not empty, got {value!r}"
        )
    return value
