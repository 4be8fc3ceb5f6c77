"""Pair sets of one's own: what is read, and what is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.pair_sets import load_pairs, pair_record
from posttrain.data.prompts import content_hash
from posttrain.data.sources import SourceSettings
from posttrain.errors import DataError
from posttrain.types import Message, PreferencePair

GOOD = {"prompt": "1+1=?", "chosen": "#2", "rejected": "#3"}


def load(path: Path, *rows: dict[str, Any]) -> list[PreferencePair]:
    file = path / "pairs.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return load_pairs(SourceSettings(source=str(file)))


def test_texts_and_conversations_are_read(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "1+1=?"},
    ]
    answers = {
        name: [{"role": "assistant", "content": text}]
        for name, text in (("chosen", "#2"), ("rejected", "two"))
    }
    beside = {"corner_case": "malformed", "system": "brief", "margin": 0.5}
    plain, talk = load(tmp_path, GOOD, {"prompt": turns, **answers, **beside})
    assert plain.prompt.messages == (Message(role="user", content="1+1=?"),)
    assert plain.prompt.prompt_id == content_hash(plain.prompt.messages)
    assert (plain.chosen, plain.rejected, plain.corner_case) == ("#2", "#3", "own")
    assert plain.system is None
    assert plain.margin is None
    assert [m.as_dict() for m in talk.prompt.messages] == turns
    assert (talk.chosen, talk.rejected) == ("#2", "two")
    assert (talk.corner_case, talk.system, talk.margin) == ("malformed", "brief", 0.5)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    pairs = load(tmp_path, GOOD | {"margin": 1.0, "system": "brief"}, GOOD | {"prompt": "2"})
    assert load(tmp_path, *map(pair_record, pairs)) == pairs


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "1", "chosen": "#2"}], "line 1: column 'rejected' is missing. .*'prompt'"),
        ([GOOD, {"prompt": "1", "rejected": "#2"}], "line 2: column 'chosen' is missing"),
        ([{"chosen": "#2", "rejected": "#3"}], "column 'prompt' is missing"),
        ([GOOD | {"rejected": "#2"}], "line 1: chosen and rejected are identical"),
        ([GOOD | {"rejected": " #2\n"}], "chosen and rejected are identical"),
        ([GOOD, GOOD], "line 2: the same two answers .* stand in line 1"),
        (
            [GOOD, GOOD | {"chosen": "#3", "rejected": "#2"}],
            "line 2: the same two answers .* stand in line 1",
        ),
        ([GOOD | {"rejected": ""}], "rejected must be a text that is not empty"),
        ([GOOD | {"chosen": 2}], "chosen must be a text"),
        ([GOOD | {"chosen": [{"role": "user", "content": "#2"}]}], "of the assistant"),
        ([GOOD | {"prompt": []}], "prompt must be a text or a list of messages"),
        ([GOOD | {"prompt": [{"role": "tool", "content": "x"}]}], "a message has a role"),
        ([GOOD | {"prompt": [{"role": "assistant", "content": "x"}]}], "the last message"),
        ([GOOD | {"margin": "much"}], "margin must be a number"),
        ([GOOD | {"system": ""}], "system must be a name"),
        ([], "has no pairs"),
    ],
)
def test_bad_pairs_are_refused_with_their_line(
    tmp_path: Path, rows: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(DataError, match=said) as caught:
        load(tmp_path, *rows)
    assert "pairs.jsonl" in str(caught.value)


def test_another_answer_to_the_same_prompt_is_another_pair(tmp_path: Path) -> None:
    assert len(load(tmp_path, GOOD, GOOD | {"rejected": "#4"})) == 2
