"""Rows of the usual formats become the same tasks; what is unusable says why."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.data.prompts import make_prompt
from posttrain.errors import DataError
from posttrain.prune.columns import (
    ColumnSettings,
    UnusableRow,
    checkable_task,
    graded_task,
)
from posttrain.types import Message
from rewards.shaping import RewardSettings

USER = {"role": "user", "content": "1+1?"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "It is #2"}
FORMATS: dict[str, dict[str, Any]] = {
    "conversation": {"messages": [USER, ANSWER]},
    "conversation and answer": {"messages": [USER], "answer": "2"},
    "prompt and completion": {"prompt": "1+1?", "completion": "It is #2"},
    "turns": {"prompt": [USER], "completion": [ANSWER]},
    "question and answer": {"question": "1+1?", "answer": "2"},
    "question and number": {"question": "1+1?", "answer": 2},
    "instruction": {"instruction": "1+1?", "input": "", "output": "\\boxed{2}"},
    "named": {"frage": "1+1?", "antwort": "2", "prompt": 7, "answer": 7},
}


def columns_of(record: dict[str, Any], **named: str) -> ColumnSettings:
    return ColumnSettings(**named).resolve(list(record))


EXACT = RewardSettings()


def task(record: dict[str, Any], rewards: RewardSettings = EXACT, **named: str) -> Any:
    return checkable_task(record, columns_of(record, **named), "stem", rewards)


@pytest.mark.parametrize("form", FORMATS)
def test_all_formats_ask_the_same(form: str) -> None:
    named = {"prompt": "frage", "answer": "antwort"} if form == "named" else {}
    found = task(FORMATS[form], **named)
    expected = make_prompt("1+1?", reference="2", domain="stem")
    assert found.prompt == expected
    assert found.task_id == task(FORMATS["question and answer"]).task_id
    if "completion" in form or form in ("conversation", "turns"):
        assert found.completion == "It is #2"


def test_earlier_turns_and_system_messages_belong_to_the_prompt() -> None:
    first = {"role": "assistant", "content": "Hello"}
    found = task({"messages": [SYSTEM, USER, first, USER, ANSWER]})
    roles = [message.role for message in found.prompt.messages]
    assert roles == ["system", "user", "assistant", "user"]
    assert found.completion == "It is #2"
    named = {"question": "1+1?", "answer": "2", "rule": "Be brief."}
    assert task(named).prompt.messages == (Message(role="user", content="1+1?"),)
    assert task(named, system="rule").prompt.messages[0] == Message(
        role="system", content="Be brief."
    )


def test_an_instructions_input_is_put_behind_it() -> None:
    record = {"instruction": "Add", "input": "1 and 1", "output": "#2"}
    assert task(record).prompt.messages[0].content == "Add\n\n1 and 1"
    # With other formats `input` is anything.
    assert task({"question": "1+1?", "input": "x", "answer": "2"}).prompt == make_prompt(
        "1+1?", reference="2", domain="stem"
    )


def test_domain_and_verifier_come_from_their_columns() -> None:
    record = {"question": "1+1?", "answer": "2", "category": "sums", "verifier": "maths"}
    found = task(record)
    assert (found.prompt.domain, found.prompt.metadata) == ("sums", {"verifier": "maths"})


def test_tasks_differ_by_what_their_answers_are_compared_with() -> None:
    record = {"question": "1+1?", "answer": "2"}
    base = task(record)
    assert task({**record, "answer": "3"}).task_id != base.task_id
    assert task({**record, "answer": "3"}).prompt.prompt_id == base.prompt.prompt_id
    assert task(record, RewardSettings(default_verifier="maths")).task_id != base.task_id
    assert task({**record, "verifier": "exact"}).task_id == base.task_id
    # Neither the domain nor the row's own answer change what is judged ...
    assert task({**record, "domain": "d", "completion": "x"}).task_id == base.task_id
    # ... but a judge of that answer sees another one.
    columns = columns_of({"question": 0, "completion": 0})
    one = graded_task({"question": "q", "completion": "a"}, columns, "stem")
    two = graded_task({"question": "q", "completion": "b"}, columns, "stem")
    assert one.task_id != two.task_id


UNUSABLE = [
    ({"messages": []}, "column 'messages' is no conversation, or an empty one"),
    ({"messages": "text"}, "column 'messages' is no conversation, or an empty one"),
    ({"messages": [{"from": "human"}]}, "column 'messages': a turn is {role: text, content: text}"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "column 'messages': a turn is"),
    ({"messages": [SYSTEM, ANSWER]}, "the prompt has no turn of a user"),
    ({"messages": [USER]}, "the answer is missing: there is no column for it, and"),
    ({"messages": [USER, {**ANSWER, "content": "two"}]}, "the answer is missing: there is no"),
    ({"question": "", "answer": "2"}, "column 'question' is missing or empty"),
    ({"question": 7, "answer": "2"}, "column 'question' must be a text, got 7"),
    ({"question": "q", "answer": None}, "the answer is missing: column 'answer' is empty"),
    ({"question": "q", "answer": ""}, "the answer is missing: column 'answer' is empty"),
    ({"question": "q", "answer": "a#b"}, "^the reference 'a#b' can never be answered"),
    ({"question": "q", "answer": 1.5}, "^the reference must be a string, got 1.5"),
    ({"question": "q", "answer": b"2"}, "the answer is no text, number, list or table of these"),
    (
        {"question": "q", "answer": "2", "verifier": "none"},
        "prompt .* asks for the verifier 'none'",
    ),
    ({"prompt": "q", "completion": [ANSWER, ANSWER]}, "column 'completion' has 2 turns, one was"),
]


@pytest.mark.parametrize(("record", "said"), UNUSABLE)
def test_what_makes_a_row_unusable(record: dict[str, Any], said: str) -> None:
    with pytest.raises(UnusableRow, match=f"^{said}"):
        task(record)


def test_a_row_without_an_answer_cannot_be_graded() -> None:
    record = {"question": "q"}
    with pytest.raises(UnusableRow, match="no answer to grade"):
        graded_task(record, columns_of(record), "stem")


def test_columns_that_are_not_there() -> None:
    with pytest.raises(DataError, match=r"no column holds a prompt.*Columns there: text, label"):
        ColumnSettings().resolve(["text", "label"])
    with pytest.raises(DataError, match=r"no column 'task' \(source\.columns\.prompt\).* text"):
        ColumnSettings(prompt="task").resolve(["text"])


def test_the_columns_that_are_read() -> None:
    columns = ColumnSettings().resolve(["id", "messages", "prompt", "answer", "solution"])
    assert columns.names() == ["messages", "answer"]
    named = ColumnSettings(prompt="prompt").resolve(["messages", "prompt", "answer"])
    assert named.names() == ["prompt", "answer"]
