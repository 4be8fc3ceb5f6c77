"""Files of tasks and supervised rows: what is read, and how what is wrong with them is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.prompts import make_prompt
from posttrain.data.sources import SourceSettings, load_prompts, load_sft_rows
from posttrain.errors import DataError
from posttrain.types import Prompt, SFTRow


def write(path: Path, *records: object) -> Path:
    """A JSON line a record; bytes stand as they are."""
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def tasks(*paths: Path, size: int | None = None) -> list[Prompt]:
    return load_prompts([SourceSettings(source=str(p), size=size) for p in paths], "train")


def rows(path: Path, size: int | None = None) -> list[SFTRow]:
    return load_sft_rows(SourceSettings(source=str(path), size=size))


def task(question: str, answer: object = "1", **more: object) -> dict[str, object]:
    return {"question": question, "answer": answer, **more}


def test_tasks_carry_reference_domain_and_verifier(tmp_path: Path) -> None:
    path = write(
        tmp_path / "algebra.jsonl",
        task("1+1=?", "2"),
        task("x?", {"variable": "x"}, domain="programs", verifier="expression", note="ignored"),
    )
    first, second = tasks(path)
    assert first == make_prompt("1+1=?", reference="2", domain="algebra")
    assert second == make_prompt(
        "x?",
        reference={"variable": "x"},
        domain="programs",
        metadata={"verifier": "expression"},
    )


def test_rows_have_ids_of_their_own_and_may_share_a_prompt(tmp_path: Path) -> None:
    path = write(
        tmp_path / "sft.jsonl",
        {"question": "1+1=?", "completion": "#2", "answer": "2", "system": "brief"},
        {"question": "1+1=?", "completion": "1+1=2#2", "answer": "2"},
        {"question": "Hello", "completion": "Hi", "system": None},
    )
    first, second, third = rows(path)
    ids = [row.row_id for row in (first, second, third)]
    assert ids == ["sft.jsonl:1", "sft.jsonl:2", "sft.jsonl:3"]
    assert first.prompt == second.prompt == make_prompt("1+1=?", reference="2", domain="sft")
    assert (first.completion, first.system) == ("#2", "brief")
    assert (second.completion, second.system) == ("1+1=2#2", None)
    assert (third.prompt.reference, third.system) == (None, None)


def test_size_cuts_before_it_reads_on(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", task("a"), task("b"), b"not reached")
    assert [p.messages[0].content for p in tasks(path, size=2)] == ["a", "b"]


def test_the_same_task_in_two_sources_counts_once(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", task("a"), task("b"), task("a"))
    two = write(tmp_path / "two.jsonl", task("b"), task("c"))
    prompts = tasks(one, two)
    assert [p.messages[0].content for p in prompts] == ["a", "b", "c"]
    assert [p.domain for p in prompts] == ["one", "one", "two"]


def test_two_answers_to_one_question_are_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", task("1+1=?", "2"))
    two = write(tmp_path / "two.jsonl", task("1+1=?", "3"))
    with pytest.raises(DataError) as caught:
        tasks(one, two)
    assert str(caught.value) == f"{two}: the question '1+1=?' has two answers, '2' and '3'"


GOOD = task("fine")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (b"{", "no JSON (Expecting property name enclosed in double quotes at character 2)"),
        (b"", "no JSON (Expecting value at character 1)"),
        (b'{"question": "caf\xe9"}', "no UTF-8 text"),
        (b"[1]", "a JSON object was expected"),
        (b"null", "a JSON object was expected"),
        ({"answer": "1"}, "column 'question' is missing. Columns there: ['answer']"),
        ({"question": "x"}, "column 'answer' is missing. Columns there: ['question']"),
        (task(""), "column 'question' must be a text that is not empty, got ''"),
        ({"question": 7, "answer": "1"}, "column 'question' must be a text that is not empty, "),
        (task("x", verifier=["exact"]), "column 'verifier' must be a text that is not empty, got"),
        (task("x", domain=3), "column 'domain' must be a text that is not empty, got 3"),
    ],
)
def test_a_malformed_task_is_named_by_file_and_line(
    tmp_path: Path, record: object, said: str
) -> None:
    path = write(tmp_path / "t.jsonl", GOOD, GOOD, record, GOOD)
    with pytest.raises(DataError) as caught:
        tasks(path)
    assert str(caught.value).startswith(f"{path}, line 3: {said}")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"completion": None}, "column 'completion' is missing"),
        ({"completion": ""}, "column 'completion' must be a text that is not empty, got ''"),
        (
            {"completion": ["#2"]},
            "column 'completion' must be a text that is not empty, got ['#2']",
        ),
        ({"system": 3}, "column 'system' must be a text that is not empty, got 3"),
        ({"system": ["brief"]}, "column 'system' must be a text that is not empty, got ['brief']"),
        ({"question": None}, "column 'question' is missing"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    good = {"question": "1+1=?", "completion": "#2"}
    path = write(tmp_path / "sft.jsonl", good, good | changes)
    with pytest.raises(DataError) as caught:
        rows(path)
    assert str(caught.value).startswith(f"{path}, line 2: {said}")


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    for source in (tmp_path / "no.jsonl", tmp_path):
        with pytest.raises(DataError) as caught:
            tasks(source)
        assert str(caught.value).startswith(f"{source} is no file. A source is 'starter' or")


def test_empty_sources_are_named_by_their_key(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    with pytest.raises(DataError, match=r"tasks\.held_out: no tasks in \['.*empty\.jsonl'\]"):
        load_prompts([SourceSettings(source=str(path))], "held_out")
    with pytest.raises(DataError, match=r"tasks\.train: no tasks in \[\]"):
        load_prompts([], "train")
    with pytest.raises(DataError, match=r"sft\.data: .*empty\.jsonl has no rows"):
        rows(path)


def test_the_starter_wants_a_size() -> None:
    starter = SourceSettings(source="starter")
    with pytest.raises(DataError, match="give it a size"):
        load_prompts([starter], "train")
    with pytest.raises(DataError, match="give it a size"):
        load_sft_rows(starter)


def test_the_starter_mixes_with_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(split: str, size: int, seed: int) -> list[Prompt]:
        return [make_prompt(f"{split} {seed} {i}", reference="1", domain="s") for i in range(size)]

    monkeypatch.setattr("posttrain.starter.tasks.starter_prompts", drawn)
    path = write(tmp_path / "own.jsonl", task("mine"))
    starter = SourceSettings(source="starter", size=2, seed=5)
    prompts = load_prompts([starter, SourceSettings(source=str(path))], "held_out")
    assert [p.messages[0].content for p in prompts] == ["held_out 5 0", "held_out 5 1", "mine"]
