"""Where tasks and supervised rows come from: the starter's generators, reasoning-gym, or files.

A file of tasks is JSON lines with `question`, `answer`, and optionally `domain` and `verifier`; a
file of supervised rows is JSON lines with `question`, `completion` and optionally `answer`,
`domain`, `verifier`, `system`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from posttrain.data.gym import gym_prompts
from posttrain.data.prompts import Split, make_prompt
from posttrain.errors import DataError
from posttrain.types import Prompt, SFTRow

STARTER = "starter"
REASONING_GYM = "reasoning_gym"


class SourceSettings(BaseModel):
    """`source` is `starter`, `reasoning_gym` or the path of a JSONL file. `size` cuts a file, or
    says how many tasks are made; `seed` is that of what is made. `family` and its `settings` are
    reasoning-gym's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(min_length=1)
    size: int | None = Field(default=None, gt=0)
    seed: int = 0
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
    for number, record in _records(settings):
        place = f"{settings.source}, line {number}"
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
    for number, record in _records(settings):
        place = f"{settings.source}, line {number}"
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


def _records(settings: SourceSettings) -> Iterator[tuple[int, Mapping[str, Any]]]:
    path = Path(settings.source)
    if not path.is_file():
        raise DataError(
            f"{settings.source} is no file. A source is 'starter', 'reasoning_gym' or the path of "
            "a JSONL file."
        )
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if settings.size is not None and number > settings.size:
                return
            try:
                record = json.loads(line.decode("utf-8").rstrip())
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {number}: no UTF-8 text ({error})") from error
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: no JSON ({error.msg} at character {error.colno})"
                ) from error
            if not isinstance(record, dict):
                raise DataError(f"{path}, line {number}: a JSON object was expected")
            yield number, record


def _prompt(record: Mapping[str, Any], source: str, place: str) -> Prompt:
    verifier = _optional_text(record, "verifier", place)
    return make_prompt(
        _text(record, "question", place),
        reference=record.get("answer"),
        domain=_optional_text(record, "domain", place) or Path(source).stem,
        metadata={} if verifier is None else {"verifier": verifier},
    )


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
