"""Sources: every row once, in order, unchanged; what cannot be read is named by file and row."""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain.data import json_lines as lines
from posttrain.errors import DataError
from posttrain.prune.schema import JsonSchema
from posttrain.prune.source import Source, open_source, open_splits

ROWS = [{"question": f"q{i}", "n": i, "tags": [f"t{i}"], "deep": {"x": i}} for i in range(7)]

BIG = 2**60 + 1
"""No fraction is exactly this."""


def opened(path: Path, **options: Any) -> Source:
    return open_source(str(path), **options)


def jsonl(path: Path, rows: list[Any]) -> Path:
    texts = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(texts) + b"\n")
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def saved(path: Path, rows: list[dict[str, Any]]) -> Path:
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(str(path))
    return path


def parts(path: Path, rows: list[dict[str, Any]], write: Any, suffix: str) -> Path:
    path.mkdir()
    write(path / f"b{suffix}", rows[4:])
    write(path / f"a{suffix}", rows[:4])
    return path


MAKERS = {
    "jsonl": lambda d: jsonl(d / "s.jsonl", ROWS),
    "parquet": lambda d: parquet(d / "s.parquet", ROWS),
    "directory of jsonl": lambda d: parts(d / "s", ROWS, jsonl, ".jsonl"),
    "directory of parquet": lambda d: parts(d / "s", ROWS, parquet, ".parquet"),
    "saved by datasets": lambda d: saved(d / "s", ROWS),
}


def tables(source: Source, wanted: list[int], total: int = 7) -> list[dict[str, Any]]:
    mask = np.zeros(total, dtype=bool)
    mask[wanted] = True
    found = []
    for numbers, table in source.tables(mask):
        found += [(int(n), row) for n, row in zip(numbers, table.to_pylist(), strict=True)]
    assert [n for n, _ in found] == wanted
    return [row for _, row in found]


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_gives_the_same_rows_in_order(tmp_path: Path, kind: str) -> None:
    source = opened(MAKERS[kind](tmp_path))
    assert list(source.columns) == ["question", "n", "tags", "deep"]
    assert source.stem == "s"
    assert source.count() == 7
    rows = list(source.rows(None, ["question", "n"]))
    assert [row.number for row in rows] == list(range(7))
    assert [(r.record["question"], r.record["n"]) for r in rows] == [(f"q{i}", i) for i in range(7)]
    assert source.schema().names == ["question", "n", "tags", "deep"]
    assert tables(source, [0, 3, 4, 6]) == [ROWS[i] for i in (0, 3, 4, 6)]
    assert source.fingerprint == opened(tmp_path / Path(kind_path(kind))).fingerprint


def kind_path(kind: str) -> str:
    return {"jsonl": "s.jsonl", "parquet": "s.parquet"}.get(kind, "s")


@pytest.mark.parametrize("kind", MAKERS)
def test_only_what_is_wanted_is_read(tmp_path: Path, kind: str) -> None:
    source = opened(MAKERS[kind](tmp_path))
    wanted = np.array([True, False, True])
    assert [row.number for row in source.rows(wanted, ["question"])] == [0, 2]
    assert tables(source, [2], total=3) == [ROWS[2]]


@pytest.mark.parametrize("kind", MAKERS)
def test_a_chunk_of_which_nothing_is_wanted(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posttrain.prune.table_source.CHUNK_ROWS", 2)
    source = opened(MAKERS[kind](tmp_path))
    wanted = np.array([True, False, False, False, False, True, False])
    found = [(row.number, row.record["n"]) for row in source.rows(wanted, ["n"])]
    assert found == [(0, 0), (5, 5)]


# `datasets` leaves it to the garbage collector to close the file in which it looked for features.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_a_directory_in_a_format_of_others(tmp_path: Path, suffix: str) -> None:
    lines = "question,n\n" + "".join(f"q{i},{i}\n" for i in range(7))
    array = json.dumps([{"question": f"q{i}", "n": i} for i in range(7)])
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / f"x{suffix}").write_text(lines if suffix == ".csv" else array)
    source = opened(tmp_path / "s")
    assert list(source.columns) == ["question", "n"]
    assert source.count() == 7
    assert [row.record for row in source.rows(None, ["n"])] == [{"n": i} for i in range(7)]
    gc.collect()


def test_a_row_of_several_files_is_named_by_its_own(tmp_path: Path) -> None:
    source = opened(MAKERS["directory of parquet"](tmp_path))
    rows = list(source.rows(None, ["n"]))
    assert [(Path(r.file).name, r.place) for r in rows] == [
        *(("a.parquet", i) for i in range(1, 5)),
        *(("b.parquet", i) for i in range(1, 4)),
    ]


def test_files_are_told_apart_by_content(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "s.jsonl", ROWS)
    before = opened(path).fingerprint
    jsonl(path, [*ROWS[:-1], {**ROWS[-1], "n": 8}])
    assert opened(path).fingerprint != before


def test_a_repository_that_datasets_reads_is_streamed(tmp_path: Path) -> None:
    # A card with configurations is `datasets`' own business.
    (tmp_path / "repo" / "data").mkdir(parents=True)
    parquet(tmp_path / "repo" / "data" / "x.parquet", ROWS)
    card = "---\nconfigs:\n- config_name: main\n  data_files: data/*.parquet\n---\n"
    (tmp_path / "repo" / "README.md").write_text(card)
    source = opened(tmp_path / "repo", subset="main")
    assert source.count() == 7
    assert [row.record for row in source.rows(None, ["n"])] == [{"n": i} for i in range(7)]
    assert tables(source, [5]) == [ROWS[5]]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("b.jsonl", "somewhere after 4 rows `datasets` cannot read on"),
        ("a.jsonl", "neither a .jsonl or .parquet file nor anything"),
    ],
)
def test_a_broken_line_that_datasets_reads_is_said(
    tmp_path: Path, broken: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posttrain.prune.table_source.CHUNK_ROWS", 2)
    repo = tmp_path / "repo"
    parts(repo, ROWS, jsonl, ".jsonl")
    (repo / "README.md").write_text(
        "---\nconfigs:\n- config_name: m\n  data_files: '*.jsonl'\n---\n"
    )
    with (repo / broken).open("a") as file:
        file.write("{\n")
    with pytest.raises(DataError) as caught:
        list(opened(repo).rows(None, ["n"]))
    message = str(caught.value)
    assert message.startswith(f"{repo}: {said}")
    assert message.endswith(
        "where a .jsonl or .parquet file itself is given, or a directory of nothing else."
    )
    rows = list(opened(repo / broken).rows(None, ["n"]))
    assert [row.record is None for row in rows].count(True) == 1
    gc.collect()


BAD_LINES = [
    (b"{", "no JSON (Expecting property name enclosed in double quotes at character 2)"),
    (b"[1]", "a JSON object was expected"),
    (b'{"question": "caf\xe9"}', "no UTF-8 text (invalid continuation byte at byte 18)"),
    (b'{"question": "a", "question": "b"}', "no usable JSON ('question' stands there twice)"),
    (b"[" * 100_000, "no usable JSON (maximum recursion depth exceeded"),
    (b'{"question": 7}', "column 'question' is a number, in most rows a text"),
    (b'{"deep": {"x": "a"}}', "does not fit into one table with the rows before it: Unable to"),
    (b'{"n": 1180591620717411303424}', "column 'n' does not fit into one table"),
    (b'{"question": "\\uD800"}', "no usable JSON ('utf-8' codec can't encode character"),
]


@pytest.mark.parametrize(("line", "said"), BAD_LINES)
def test_a_bad_line_is_named_and_the_others_stay(tmp_path: Path, line: bytes, said: str) -> None:
    path = jsonl(tmp_path / "s.jsonl", [*ROWS[:3], line, *ROWS[3:]])
    source = opened(path)
    rows = list(source.rows(None, []))
    (bad,) = [row for row in rows if row.record is None]
    assert (bad.number, bad.place, bad.file) == (3, 4, str(path))
    assert bad.problem is not None
    assert bad.problem.startswith(said)
    content = path.read_bytes()
    assert content[bad.offset : bad.offset + bad.length] == line
    assert tables(source, [0, 1, 2, 4, 5, 6, 7], total=8) == ROWS


def test_the_first_row_does_not_decide_what_the_others_must_be(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "s.jsonl", [{"question": ["odd"]}, *ROWS])
    rows = list(opened(path).rows(None, []))
    assert [row.record is None for row in rows] == [True] + [False] * 7


def test_columns_may_come_and_go_and_numbers_mix(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"a": 1.5, "b": None}, {"b": {"x": 1}}, {"b": {"x": None}}]
    source = opened(jsonl(tmp_path / "s.jsonl", rows))
    assert [row.problem for row in source.rows(None, [])] == [None] * 4
    assert tables(source, [0, 1, 2, 3], total=4) == [
        {"a": 1.0, "b": None},
        {"a": 1.5, "b": None},
        {"a": None, "b": {"x": 1}},
        {"a": None, "b": {"x": None}},
    ]


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (
            {"reference": {"alice": "knight", "bob": "knave"}},
            {"reference": {"carol": "knave"}},
            "objects in 'reference' have other keys than before ('alice', 'bob', 'carol'), which"
            " one table would add as null where they are missing",
        ),
        ({"deep": {"x": {}}}, {"deep": {"x": {"y": None}}}, "objects in 'deep.x' have other keys"),
        (
            {"turns": [{"role": "user"}, {"role": "tool", "name": "f"}]},
            {"turns": []},
            "row 1: objects in 'turns[]' have other keys than before ('name'), which",
        ),
        (
            {"x": dict.fromkeys("fedcba", 1)},
            {"x": {}},
            "other keys than before ('a', 'b', 'c', 'd', 'e', …)",
        ),
        ({"n": BIG}, {"n": 0.5}, "numbers in 'n' are both fractions and integers beyond 2**53"),
        ({"n": [[0.5]]}, {"n": [[BIG]]}, "numbers in 'n[][]' are both fractions and integers"),
    ],
)
def test_what_one_table_would_change_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: dict[str, Any],
    second: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.setattr("posttrain.prune.json_source.CHUNK_ROWS", 1)
    path = jsonl(tmp_path / "s.jsonl", [first, second])
    with pytest.raises(DataError, match=re.escape(said)) as caught:
        list(opened(path).rows(None, []))
    assert str(caught.value).startswith(f"{path}, row ")
    assert "Ask for JSON lines (--format jsonl), which stay as they are" in str(caught.value)
    source = opened(path, one_table=False)
    assert [row.record for row in source.rows(None, [])] == [first, second]


def test_objects_are_compared_however_deep_they_lie(tmp_path: Path) -> None:
    deep = "[" * 500 + "%s" + "]" * 500
    path = tmp_path / "s.jsonl"
    path.write_text("".join(f'{{"x": {deep % inner}}}\n' for inner in ('{"a": 1}', '{"b": 1}')))
    with pytest.raises(DataError, match=r"\[\]' have other keys than before \('a', 'b'\)"):
        list(opened(path).rows(None, []))


def test_a_line_of_a_hundred_megabytes_is_not_taken_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    size = 100_000_000
    with path.open("wb") as file:
        file.write(b'{"question": "a"}\n{"question": "')
        for _ in range(100):
            file.write(b"x" * (size // 100))
        file.write(b'"}\n{"question": "b"}\n')
    first, long, last = opened(path).rows(None, [])
    assert (first.record, last.record) == ({"question": "a"}, {"question": "b"})
    assert long.problem == f"a line of {size + 16:,} bytes; the limit is {lines.MAX_LINE_BYTES:,}"
    assert (long.offset, long.length, long.content) == (18, size + 16, "")
    held = max(len(line.content or b"") for line in lines.read_lines(path))
    assert held < 100


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}')
    rows = list(opened(path).rows(None, []))
    assert [(r.number, r.place, r.record) for r in rows] == [(0, 1, {"a": 1}), (1, 4, {"a": 2})]
    assert tables(opened_with_schema(path), [0, 1], total=2) == [{"a": 1}, {"a": 2}]


def opened_with_schema(path: Path) -> Source:
    """As a second process opens it."""
    first = opened(path)
    list(first.rows(None, []))
    second = opened(path)
    second.restore(first.schema())
    return second


def test_lines_come_back_as_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    texts = ['{"a": 1.0,   "b":"é"}', '{"b": "\\u00e9", "a": 2}']
    path.write_text("\n".join(texts), encoding="utf-8")
    ((numbers, found),) = opened(path).lines(np.ones(2, dtype=bool))
    assert (list(numbers), found) == ([0, 1], texts)


def test_text_in_parquet_that_is_no_utf8(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"caf\xe9", b"good"])
    path = tmp_path / "s.parquet"
    pq.write_table(pa.table({"question": raw.view(pa.string())}), path)
    rows = list(opened(path).rows(None, ["question"]))
    assert [row.record for row in rows] == [{"question": "fine"}, None, {"question": "good"}]
    assert rows[1].problem == "no UTF-8 text (unexpected end of data at byte 4)"


def test_parquet_files_with_other_columns_become_one_table(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    parquet(tmp_path / "s" / "a.parquet", [{"x": 1}])
    parquet(tmp_path / "s" / "b.parquet", [{"x": 2, "y": "z"}])
    source = opened(tmp_path / "s")
    assert tables(source, [0, 1], total=2) == [{"x": 1, "y": None}, {"x": 2, "y": "z"}]
    parquet(tmp_path / "s" / "c.parquet", [{"x": "text"}])
    with pytest.raises(DataError, match=r"c\.parquet cannot be read as Parquet: Unable to merge"):
        opened(tmp_path / "s")


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"x": BIG}, {"x": 0.5}, "a.parquet: column 'x' is int64, and in one table .* double,"),
        ({"x": [BIG]}, {"x": [0.5]}, "a.parquet: column 'x' is list<"),
        ({"x": {"a": 1}}, {"x": {"b": 1}}, "a.parquet: column 'x' is struct<a: int64>"),
        ({"x": {"a": 1}}, {"x": {"a": 1, "b": 1}}, "a.parquet: column 'x' is struct<a: int64>"),
    ],
)
def test_parquet_files_whose_values_would_change_in_one_table(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], said: str
) -> None:
    (tmp_path / "s").mkdir()
    parquet(tmp_path / "s" / "a.parquet", [first])
    parquet(tmp_path / "s" / "b.parquet", [second])
    with pytest.raises(DataError, match=f"{said}.*Write the files with one type, or ask for JSON"):
        opened(tmp_path / "s")
    source = opened(tmp_path / "s", one_table=False)
    assert [row.record for row in source.rows(None, ["x"])] == [first, second]
    found = [json.loads(line) for _, lines_ in source.lines(np.ones(2, bool)) for line in lines_]
    assert found == [first, second]


def test_types_that_hold_the_same_values_go_together(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    for name, kind in {
        "a": pa.schema({"n": pa.int32(), "t": pa.string(), "l": pa.list_(pa.null())}),
        "b": pa.schema({"n": pa.int64(), "t": pa.large_string(), "l": pa.list_(pa.string())}),
    }.items():
        table = pa.Table.from_pylist([{"n": 7, "t": name, "l": []}], schema=kind)
        pq.write_table(table, tmp_path / "s" / f"{name}.parquet")
    source = opened(tmp_path / "s")
    assert tables(source, [0, 1], total=2) == [{"n": 7, "t": t, "l": []} for t in "ab"]


def test_a_damaged_page_is_named_as_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    table = pa.table({"n": range(4000), "fine": range(4000)})
    pq.write_table(table, path, row_group_size=2000, use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    with path.open("r+b") as file:
        file.seek(column.data_page_offset)
        file.write(b"\xff" * 100)
    source = opened(path)
    assert len(list(source.rows(None, ["fine"]))) == 4000
    with pytest.raises(
        DataError, match=r"s\.parquet: after row 2,000 it cannot be read on \(.*anew"
    ):
        list(source.rows(None, ["n"]))
    with pytest.raises(DataError, match=r"s\.parquet: after row 2,000"):
        list(source.tables(np.ones(4000, bool)))


def test_what_is_not_there_or_no_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.jsonl: there is no such file"):
        opened(tmp_path / "no.jsonl")
    (tmp_path / "s.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"s\.csv: a source ends in \.jsonl or \.parquet"):
        opened(tmp_path / "s.csv")
    (tmp_path / "s.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"s\.parquet cannot be read as Parquet"):
        opened(tmp_path / "s.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: neither a \.jsonl .* can load as split 'train'"):
        opened(tmp_path / "empty")


def test_without_one_table_rows_need_not_fit_together(tmp_path: Path) -> None:
    mixed = [{"a": 1}, {"a": "x"}, {"a": {"b": []}}]
    source = opened(jsonl(tmp_path / "s.jsonl", mixed), one_table=False)
    assert [row.record for row in source.rows(None, [])] == mixed
    ((_, lines_),) = source.lines(np.array([True, False, True]))
    assert list(map(json.loads, lines_)) == [mixed[0], mixed[2]]


def test_tables_have_lines_too(tmp_path: Path) -> None:
    source = opened(parquet(tmp_path / "s.parquet", ROWS))
    ((numbers, lines_),) = source.lines(np.array([False, True]))
    assert list(numbers) == [1]
    assert json.loads(lines_[0]) == ROWS[1]


def test_a_row_that_does_not_fit_leaves_no_trace() -> None:
    schema = JsonSchema()
    assert schema.admit([{"a": 1}, {"a": 2}]) == [None, None]
    before = schema.schema
    (problem,) = schema.admit([{"a": {"b": 1}, "new": 1}])
    assert problem is not None
    assert problem.startswith("column 'a' is an object, in most rows a number (--format jsonl")
    assert schema.schema == before


def test_all_splits_of_a_repository_that_datasets_reads(tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    parquet(tmp_path / "repo" / "train.parquet", ROWS)
    parquet(tmp_path / "repo" / "test.parquet", ROWS[:1])
    (tmp_path / "repo" / "README.md").write_text("---\nlicense: mit\n---\n")
    path = str(tmp_path / "repo")

    def rows(split: str | None) -> list[list[Any]]:
        splits = open_splits(path, split=split, subset=None)
        return [[row.record for row in s.rows(None, s.columns)] for s in splits]

    assert rows("test") == [ROWS[:1]]
    assert rows(None) == [ROWS, ROWS[:1]]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: neither .* can load with its splits: "):
        open_splits(str(tmp_path / "empty"), split=None, subset=None)
