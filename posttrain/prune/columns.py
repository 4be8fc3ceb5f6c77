"""From a row to the task that it holds: which columns are read, and how."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from posttrain.data.prompts import column_reference, content_hash
from posttrain.errors import DataError
from posttrain.types import Message, Prompt
from rewards.answer import extract_answer
from rewards.maths_answer import boxed_answer
from rewards.shaping import RewardSettings
from rewards.verifiers import check_reference, verifier_name

RECOGNISED = {
    "messages": ("messages",),
    "prompt": ("prompt", "question", "instruction", "problem"),
    "context": ("input",),
    "completion": ("completion", "response", "output", "solution"),
    "answer": ("answer", "reference", "final_answer", "ground_truth"),
    "domain": ("domain", "category"),
    "verifier": ("verifier",),
}
"""What a column is called that is not named; the first of each that is there is taken."""


class ColumnSettings(BaseModel):
    """Names of columns, where they are not recognised (see `RECOGNISED`).

    `messages` is a conversation whose last turn is the answer; `prompt` a text or such a
    conversation without the answer; `context` is put behind the prompt; `system` a text that goes
    before it, only if it is named.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    messages: str | None = None
    prompt: str | None = None
    context: str | None = None
    completion: str | None = None
    answer: str | None = None
    domain: str | None = None
    verifier: str | None = None
    system: str | None = None

    def resolve(self, columns: Sequence[str], setting: str = "source.columns") -> ColumnSettings:
        """The columns that are read out of those that there are. Raises DataError for a named one
        that is missing, or if none holds a prompt; `setting` is what these are called there."""
        named = {role: name for role, name in self if name is not None}
        for role, name in named.items():
            if name not in columns:
                raise DataError(
                    f"there is no column {name!r} ({setting}.{role}). {_listed(columns)}"
                )
        found = {
            role: next((name for name in names if name in columns), None)
            for role, names in RECOGNISED.items()
        } | named
        if found["messages"] and "prompt" not in named:
            found["prompt"] = found["context"] = found["completion"] = None
        elif found["prompt"]:
            found["messages"] = None
            # `input` is the context of an instruction and nothing in other formats.
            if "context" not in named and found["prompt"] != "instruction":
                found["context"] = None
        else:
            raise DataError(
                f"no column holds a prompt; name it with {setting}.messages or .prompt. "
                f"{_listed(columns)}"
            )
        return ColumnSettings(**found)

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for _, name in self if name is not None))


class UnusableRow(Exception):
    """What is wrong with a row, for its quarantine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is judged: a prompt with the reference that its answers are scored against, or with the
    completion that is graded. Rows with equal tasks share one judgement; its id is their hash."""

    task_id: str
    prompt: Prompt
    completion: str | None


def checkable_task(
    record: Mapping[str, Any], columns: ColumnSettings, stem: str, rewards: RewardSettings
) -> Task:
    """A task whose answers a verifier scores. Rows without a domain get `stem`.

    Raises UnusableRow, also where the verifier cannot use the reference.
    """
    messages, completion = conversation(record, columns)
    verifier = _text(record, columns.verifier)
    prompt = Prompt(
        prompt_id=content_hash(messages),
        messages=messages,
        reference=_reference(record, columns, completion),
        domain=_text(record, columns.domain) or stem,
        metadata={} if verifier is None else {"verifier": verifier},
    )
    task_id = _task_id(prompt.prompt_id, [prompt.reference, verifier_name(prompt, rewards)])
    try:
        check_reference(prompt, rewards)
    except DataError as error:
        # The row is named already: without the prompt's name, reasons alike count together.
        raise UnusableRow(str(error.__cause__ or error)) from error
    return Task(task_id=task_id, prompt=prompt, completion=completion)


def graded_task(record: Mapping[str, Any], columns: ColumnSettings, stem: str) -> Task:
    """A task whose own completion is graded. Raises UnusableRow."""
    messages, completion = conversation(record, columns)
    if not completion:
        raise UnusableRow("no answer to grade: no last turn of the assistant, no completion")
    prompt = Prompt(
        prompt_id=content_hash(messages),
        messages=messages,
        reference=None,
        domain=_text(record, columns.domain) or stem,
    )
    return Task(
        task_id=_task_id(prompt.prompt_id, [completion]), prompt=prompt, completion=completion
    )


def _task_id(prompt_id: str, compared: Sequence[Any]) -> str:
    try:
        content = json.dumps([prompt_id, *compared], ensure_ascii=False, sort_keys=True)
    except TypeError as error:
        raise UnusableRow(
            f"the answer is no text, number, list or table of these: {error}"
        ) from None
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def conversation(
    record: Mapping[str, Any], columns: ColumnSettings
) -> tuple[tuple[Message, ...], str | None]:
    """The prompt's messages and the answer that the row gives to them. Raises UnusableRow."""
    if columns.messages is not None:
        messages = _messages(record.get(columns.messages), columns.messages)
        completion = None
        if messages[-1].role == "assistant":
            *messages, last = messages
            completion = last.content
    else:
        assert columns.prompt is not None
        messages = _prompt(record, columns.prompt, _text(record, columns.context))
        completion = _completion(record, columns.completion)
    if system := _text(record, columns.system):
        messages = [Message(role="system", content=system), *messages]
    if not any(message.role == "user" for message in messages):
        raise UnusableRow("the prompt has no turn of a user")
    return tuple(messages), completion


def _prompt(record: Mapping[str, Any], column: str, context: str | None) -> list[Message]:
    value = record.get(column)
    if isinstance(value, list):
        return _messages(value, column)
    text = _text(record, column)
    if text is None:
        raise UnusableRow(f"column {column!r} is missing or empty")
    return [Message(role="user", content=text if context is None else f"{text}\n\n{context}")]


def _completion(record: Mapping[str, Any], column: str | None) -> str | None:
    if column is None:
        return None
    value = record.get(column)
    if isinstance(value, list):
        turns = _messages(value, column)
        if len(turns) != 1:
            raise UnusableRow(f"column {column!r} has {len(turns)} turns, one was expected")
        return turns[0].content
    return _text(record, column)


def _messages(value: object, column: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise UnusableRow(f"column {column!r} is no conversation, or an empty one")
    messages = []
    for turn in value:
        match turn:
            case {"role": str(role), "content": str(content)}:
                messages.append(Message(role=role, content=content))
            case _:
                raise UnusableRow(
                    f"column {column!r}: a turn is {{role: text, content: text}}, got "
                    f"{str(turn)[:80]}"
                )
    return messages


def _reference(record: Mapping[str, Any], columns: ColumnSettings, completion: str | None) -> Any:
    """The answer column, else what stands in `\\boxed{}` or behind `#` in the row's own answer."""
    if columns.answer is not None:
        value = record.get(columns.answer)
        if value is None or value == "":
            raise UnusableRow(f"the answer is missing: column {columns.answer!r} is empty")
        return column_reference(value)
    found = completion and (boxed_answer(completion) or extract_answer(completion))
    if not found:
        raise UnusableRow(
            "the answer is missing: there is no column for it, and the completion has none in "
            "\\boxed{} or behind `#`"
        )
    return found


def _text(record: Mapping[str, Any], column: str | None) -> str | None:
    value = None if column is None else record.get(column)
    if value is not None and not isinstance(value, str):
        raise UnusableRow(f"column {column!r} must be a text, got {str(value)[:80]}")
    return value or None


def _listed(columns: Sequence[str]) -> str:
    return f"Columns there: {', '.join(columns)}"
