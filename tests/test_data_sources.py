"""Files of tasks and supervised rows: what is read, and how what is wrong with them is named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.prompts import Split, check_disjoint, make_prompt
from posttrain.data.sources import SourceSettings, load_prompts, load_sft_rows
from posttrain.errors import DataError
from posttrain.types import Prompt, SFTRow
from rewards.shaping import RewardSettings
from rewards.verifiers import check_references, verifier_of

SPLITS: tuple[Split, Split] = ("train", "held_out")


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
        assert str(caught.value).startswith(f"{source} is no file. A source is 'starter', 'r")


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


def gym(family: str, split: Split, *, size: int = 20, **settings: object) -> list[Prompt]:
    source = SourceSettings(
        source="reasoning_gym", family=family, size=size, seed=3, settings=dict(settings)
    )
    return load_prompts([source], split)


@pytest.mark.parametrize("family", ["chain_sum", "leg_counting", "simple_equations"])
def test_reasoning_gym_tasks_are_scored_by_their_own_family(family: str) -> None:
    prompts = gym(family, "train")
    check_references(prompts, RewardSettings())
    assert len({prompt.prompt_id for prompt in prompts}) == 20
    assert {prompt.domain for prompt in prompts} == {family}
    for prompt in prompts:
        right = str(prompt.reference["entry"]["answer"])
        verify = verifier_of(prompt, RewardSettings())
        assert verify(prompt, f"<answer>{right}</answer>").correctness == 1.0
        assert verify(prompt, "<answer>no</answer>").correctness == 0.0


def test_reasoning_gym_settings_and_splits() -> None:
    train, held_out = (gym("chain_sum", split, min_terms=2, max_terms=2) for split in SPLITS)
    check_disjoint(train, held_out)
    assert train == gym("chain_sum", "train", min_terms=2, max_terms=2)
    assert {len(p.reference["entry"]["metadata"]["expression"].split()) for p in train} == {3}


@pytest.mark.parametrize(
    ("family", "settings", "named"),
    [
        ("chain_sums", {}, "no family 'chain_sums'; there are ab, "),
        ("chain_sum", {"terms": 2}, "does not take the settings {'terms': 2}: TypeError"),
        ("chain_sum", {"min_terms": 9, "max_terms": 2}, "does not take the settings"),
    ],
)
def test_reasoning_gym_that_cannot_be_made(family: str, settings: Any, named: str) -> None:
    with pytest.raises(DataError, match=re.escape(named)):
        gym(family, "train", **settings)


def test_a_family_that_is_used_up_is_named() -> None:
    few = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(DataError, match=r"'chain_sum' .* has only \d+ train prompts, 999 were"):
        gym("chain_sum", "train", size=999, **few)


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"source": "reasoning_gym"}, "needs a family"),
        ({"source": "starter", "family": "chain_sum"}, "are reasoning_gym's"),
        ({"source": "x.jsonl", "settings": {"a": 1}}, "are reasoning_gym's"),
    ],
)
def test_families_belong_to_reasoning_gym(record: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SourceSettings(**record)


def test_reasoning_gym_has_no_supervised_rows() -> None:
    settings = SourceSettings(source="reasoning_gym", family="chain_sum", size=1)
    with pytest.raises(DataError, match="no completions"):
        load_sft_rows(settings)
