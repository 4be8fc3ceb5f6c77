"""Preference pairs of one's own: JSON lines with `prompt`, `chosen` and `rejected`.

`prompt` is a text or a list of messages, `chosen` and `rejected` are texts or lists of one message
of the assistant; `corner_case`, `system` (the name of a system instruction) and `margin` may stand
beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.data.prompts import content_hash
from posttrain.data.sources import SourceSettings, read_records
from posttrain.errors import DataError
from posttrain.types import Message, PreferencePair, Prompt

OWN = "own"
"""The corner case of a pair that names none."""
ROLES = ("system", "user", "assistant")


def load_pairs(settings: SourceSettings) -> list[PreferencePair]:
    """The pairs of a file, in order.

    Raises:
        DataError: it is missing, empty or malformed; a row lacks a column, prefers an answer to
            itself, or says of a prompt what another row said, or the contrary. Names the line.
    """
    pairs: list[PreferencePair] = []
    lines: dict[tuple[str, str | None, frozenset[str]], int] = {}
    for number, record in read_records(settings):
        place = f"{settings.source}, line {number}"
        pair = _pair(record, place)
        key = (pair.prompt.prompt_id, pair.system, frozenset((pair.chosen, pair.rejected)))
        if key in lines:
            raise DataError(
                f"{place}: the same two answers to the same prompt stand in line {lines[key]}; "
                "remove one of the two pairs"
            )
        lines[key] = number
        pairs.append(pair)
    if not pairs:
        raise DataError(f"dpo.data: {settings.source} has no pairs")
    return pairs


def pair_record(pair: PreferencePair) -> dict[str, Any]:
    """A row of such a file."""
    record: dict[str, Any] = {
        "prompt": [message.as_dict() for message in pair.prompt.messages],
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "corner_case": pair.corner_case,
    }
    beside = {"system": pair.system, "margin": pair.margin}
    return record | {name: value for name, value in beside.items() if value is not None}


def _pair(record: Mapping[str, Any], place: str) -> PreferencePair:
    messages = _conversation(record, place)
    chosen, rejected = (_answer(record, column, place) for column in ("chosen", "rejected"))
    if chosen.strip() == rejected.strip():
        raise DataError(f"{place}: chosen and rejected are identical, so that nothing is preferred")
    return PreferencePair(
        prompt=Prompt(
            prompt_id=content_hash(messages),
            messages=messages,
            reference=None,
            domain=OWN,
        ),
        system=_name(record, "system", place),
        chosen=chosen,
        rejected=rejected,
        corner_case=_name(record, "corner_case", place) or OWN,
        margin=_margin(record, place),
    )


def _conversation(record: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    value = _present(record, "prompt", place)
    if isinstance(value, str) and value:
        return (Message(role="user", content=value),)
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: prompt must be a text or a list of messages, got {value!r}")
    messages = tuple(_message(entry, place) for entry in value)
    if messages[-1].role == "assistant":
        raise DataError(f"{place}: the last message of prompt is the assistant's own")
    return messages


def _answer(record: Mapping[str, Any], column: str, place: str) -> str:
    value = _present(record, column, place)
    if isinstance(value, list) and len(value) == 1:
        message = _message(value[0], place)
        value = message.content if message.role == "assistant" else None
    if not isinstance(value, str) or not value:
        raise DataError(
            f"{place}: {column} must be a text that is not empty, or a list of one message of the "
            f"assistant, got {record[column]!r}"
        )
    return value


def _message(entry: Any, place: str) -> Message:
    known = isinstance(entry, dict) and entry.get("role") in ROLES
    if not known or not isinstance(entry.get("content"), str) or not entry["content"]:
        raise DataError(
            f"{place}: a message has a role ({', '.join(ROLES)}) and a content, got {entry!r}"
        )
    return Message(role=entry["role"], content=entry["content"])


def _present(record: Mapping[str, Any], column: str, place: str) -> Any:
    if record.get(column) is None:
        raise DataError(f"{place}: column {column!r} is missing. Columns there: {sorted(record)}")
    return record[column]


def _name(record: Mapping[str, Any], column: str, place: str) -> str | None:
    value = record.get(column)
    if value is not None and (not isinstance(value, str) or not value):
        raise DataError(f"{place}: {column} must be a name, got {value!r}")
    return value


def _margin(record: Mapping[str, Any], place: str) -> float | None:
    value = record.get("margin")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise DataError(f"{place}: margin must be a number, got {value!r}")
    return value
