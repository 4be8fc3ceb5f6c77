"""Files of tasks and supervised rows: what is read, and how what is wrong with them is named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.prompts import make_prompt
from posttrain.data.sources import SourceSettings, load_prompts, load_sft_rows
from posttrain.errors import DataError
from posttrain.types import Prompt, SFTRow
from rewards.shaping import RewardSettings
from rewards.verifiers import check_references


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


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "a", "answer": "1"}\r\n \n{"question": ""}\n\n')
    assert tasks(path, size=1) == [make_prompt("a", reference="1", domain="t")]
    with pytest.raises(DataError, match="line 3: column 'answer' is missing"):
        tasks(path)


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
        (b'{"question": "caf\xe9"}', "no UTF-8 text"),
        (b"[1]", "a JSON object was expected"),
        (b"null", "a JSON object was expected"),
        (b'{"question": "\\ud800", "answer": "1"}', "no usable JSON ('utf-8' codec can't encode"),
        (b'{"question": "x", "answer": ' + b"9" * 5000 + b"}", "no usable JSON (Exceeds the limit"),
        (b"[" * 100_000, "no usable JSON (maximum recursion depth exceeded"),
        (
            b'{"question": "x", "answer": "1", "answer": "2"}',
            "no usable JSON ('answer' stands there twice)",
        ),
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
    with pytest.raises(DataError) as caught:
        tasks(tmp_path / "no.jsonl")
    assert str(caught.value).startswith(f"{tmp_path / 'no.jsonl'} is no file. A source is")
    with pytest.raises(DataError, match="is neither a file nor a data set that can be loaded"):
        tasks(tmp_path)


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


GSM8K = [
    {"question": "3 hens, 4 eggs each?", "answer": "3 * 4 = <<3*4=12>>12\n#### 12"},
    {"question": "5 & 6?", "answer": "5 + 6 = 11 #### no\n#### 1,100"},
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "directory", "saved"])
def test_what_is_shaped_like_gsm8k_is_read_from_any_kind_of_file(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    table = datasets.Dataset.from_list(GSM8K)
    source = {
        "jsonl": tmp_path / "gsm.jsonl",
        "parquet": tmp_path / "gsm.parquet",
        "csv": tmp_path / "gsm.csv",
        "directory": tmp_path / "gsm",
        "saved": tmp_path / "gsm",
    }[kind]
    if kind == "jsonl":
        write(source, *GSM8K)
    elif kind == "saved":
        table.save_to_disk(source)
    elif kind == "csv":
        table.to_csv(source)
    else:
        parquet = source / "train.parquet" if kind == "directory" else source
        parquet.parent.mkdir(exist_ok=True)
        table.to_parquet(parquet)
    settings = SourceSettings(source=str(source), answer_after="####")
    assert load_prompts([settings], "train") == [
        make_prompt("3 hens, 4 eggs each?", reference="12", domain="gsm"),
        make_prompt("5 & 6?", reference="1,100", domain="gsm"),
    ]
    same = SourceSettings(source=str(source), answer_after="####", columns={"completion": "answer"})
    first, _ = load_sft_rows(same)
    assert first.completion == GSM8K[0]["answer"]
    assert first.prompt.reference == "12"


def test_csv_is_text_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(
        b"\xef\xbb\xbfquestion,answer,domain\r\na,0101,\r\nb,1.50,None\r\n\r\n"
        b'"c, ""d""\r\ne",NA,' + b"x" * 200_000
    )
    assert tasks(path) == [
        make_prompt("a", reference="0101", domain="t"),
        make_prompt("b", reference="1.50", domain="None"),
        make_prompt('c, "d"\r\ne', reference="NA", domain="x" * 200_000),
    ]
    check_references(tasks(path)[:2], RewardSettings(default_verifier="maths"))


def test_a_directory_of_csv_files_is_text_as_it_stands(tmp_path: Path) -> None:
    directory = tmp_path / "set"
    directory.mkdir()
    (directory / "README.md").write_text("two parts, one test")
    (directory / "train_0.csv").write_text("question,answer\na,0101\nb,101\n")
    (directory / "train_1.csv").write_text('question,answer\n\n"c\nd",1.50\n')
    (directory / "test.csv").write_text("question,answer\ne,007\nf\n")
    train = SourceSettings(source=str(directory), split="train")
    assert load_prompts([train], "train") == [
        make_prompt("a", reference="0101", domain="set"),
        make_prompt("b", reference="101", domain="set"),
        make_prompt("c\nd", reference="1.50", domain="set"),
    ]
    test = SourceSettings(source=str(directory), split="test", size=1)
    assert load_prompts([test], "held_out") == [make_prompt("e", reference="007", domain="set")]
    with pytest.raises(DataError, match="several splits; name one as `split`: train, test"):
        tasks(directory)
    (directory / "train_1.csv").write_text("question,answer\nc,1,2\n")
    with pytest.raises(DataError, match=r"train_1\.csv, row 1: more fields than the header's 2"):
        load_prompts([train], "train")


@pytest.mark.parametrize(
    "header",
    [b"question,answer,,", b"\r\nquestion,answer,,", b"\xef\xbb\xbf\n,,,\nquestion,answer,,"],
)
def test_csv_of_a_spreadsheet(tmp_path: Path, header: bytes) -> None:
    """Columns without a name, and empty rows over the header."""
    path = tmp_path / "t.csv"
    path.write_bytes(header + b"\na,1,,\nb,2,x,y\n,3,,\n")
    assert tasks(path, size=2) == [
        make_prompt("a", reference="1", domain="t"),
        make_prompt("b", reference="2", domain="t"),
    ]
    with pytest.raises(DataError, match=r"row 3: column 'question' is missing. .*'question'\]"):
        tasks(path)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (b"a,1\nb,\n", "row 2: column 'answer' is missing"),
        (b"a,1\nb\n", "row 2: column 'answer' is missing"),
        (b"a,1\nb,2,3\n", "row 2: more fields than the header's 2"),
        (b'a,1\n"b,2\nc,3\n', "row 2: no CSV (unexpected end of data)"),
        (b"a,1\nb,caf\xe9\n", "row 2: no UTF-8 text"),
    ],
)
def test_malformed_csv_is_named_by_file_and_row(tmp_path: Path, rows: bytes, said: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"question,answer\n" + rows)
    with pytest.raises(DataError, match=re.escape(f"{path}, {said}")):
        tasks(path)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"question,,question,\na,,b,\n")
    with pytest.raises(DataError, match="two columns have one name: question, question"):
        tasks(path)


def test_whole_numbers_of_a_table_are_answers(tmp_path: Path) -> None:
    import datasets

    path = tmp_path / "t.parquet"
    table = [{"question": "a", "answer": 42, "n": 7}, {"question": "b", "answer": -1, "n": 8}]
    datasets.Dataset.from_list(table).to_parquet(path)
    assert [prompt.reference for prompt in tasks(path)] == ["42", "-1"]
    for verifier in ("exact", "maths"):
        check_references(tasks(path), RewardSettings(default_verifier=verifier))
    other = SourceSettings(source=str(path), columns={"answer": "n"})
    assert [p.reference for p in load_prompts([other], "train")] == ["7", "8"]


def test_one_of_several_splits_is_named(tmp_path: Path) -> None:
    import datasets

    for split, row in zip(("train", "test"), GSM8K, strict=True):
        (tmp_path / "gsm").mkdir(exist_ok=True)
        datasets.Dataset.from_list([row]).to_parquet(tmp_path / "gsm" / f"{split}.parquet")
    source = str(tmp_path / "gsm")
    (prompt,) = load_prompts([SourceSettings(source=source, split="test")], "held_out")
    assert prompt.messages[0].content == "5 & 6?"
    for split, said in ((None, "several splits; name one"), ("dev", "no split 'dev'")):
        with pytest.raises(DataError, match=rf"{said} as `split`: train, test"):
            load_prompts([SourceSettings(source=source, split=split)], "train")


def test_columns_that_are_called_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"problem": "1+1", "solution": "2", "answer": "wrong"})
    columns = {"question": "problem", "answer": "solution"}
    (prompt,) = load_prompts([SourceSettings(source=str(path), columns=columns)], "train")
    assert (prompt.messages[0].content, prompt.reference) == ("1+1", "2")
    with pytest.raises(DataError, match=r"line 1: column 'text', the 'question' of `columns`"):
        load_prompts([SourceSettings(source=str(path), columns={"question": "text"})], "train")


def test_an_answer_without_its_mark_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", task("q", "#### 1"), task("r", "I do not know"))
    with pytest.raises(DataError, match=r"line 2: nothing stands behind '####' in the answer 'I "):
        load_prompts([SourceSettings(source=str(path), answer_after="####")], "train")


@pytest.mark.parametrize("asked", ["openai/gsm8k", "AI-MO/NuminaMath-1.5"])
def test_a_name_on_the_hub_is_loaded_with_its_subset(
    monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    import datasets

    def load_dataset(name: str, subset: str | None) -> Any:
        assert (name, subset) == (asked, "main")
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(GSM8K)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings = SourceSettings(
        source=asked, subset="main", split="train", answer_after="####", size=1
    )
    (prompt,) = load_prompts([settings], "train")
    assert (prompt.reference, prompt.domain) == ("12", asked.partition("/")[2])


@pytest.mark.parametrize("name", ["data/no.jsonl", "data/no.json", "data/no.csv", "no.parquet"])
def test_a_file_that_is_missing_is_no_name_on_the_hub(name: str) -> None:
    with pytest.raises(DataError, match=f"{name} is no file"):
        load_prompts([SourceSettings(source=name)], "train")
