"""`posttrain reward`: rows, outcomes, explanations, what is left out, and how it ends."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from judge_endpoint import serve

from posttrain import cli

ROWS: list[dict[str, Any]] = [
    {"question": "1+1?", "answer": "2", "completion": "#2"},
    {"question": "1+1?", "answer": "2", "completion": "#3"},
    {"question": "1+1?", "answer": "2", "completion": "two"},
    {"question": "1+1?", "answer": "2", "completion": "#2", "finish_reason": "length"},
    {"question": "a half?", "answer": "1/2", "completion": r"\boxed{0.5}", "verifier": "maths"},
]
BAD = [
    b"{nonsense",
    b'["a list"]',
    b"\xff\xfe",
    b'{"question": "\\ud800", "answer": "2", "completion": "#2"}',
    b'{"question": "?", "answer": "2", "answer": "3", "completion": "#2"}',
    b'{"question": "?", "answer": "2"}',
    b'{"answer": "2", "completion": "#2"}',
    b'{"question": 5, "answer": "2", "completion": "#2"}',
    b'{"question": "?", "answer": 2, "completion": "#2"}',
    b'{"question": "?", "answer": "2", "completion": "#2", "verifier": "nope"}',
    b'{"messages": [{"role": "user"}], "answer": "2", "completion": "#2"}',
]


def write(path: Path, rows: list[dict[str, Any]], bad: list[bytes] | None = None) -> Path:
    lines = [json.dumps(row).encode() for row in rows] + (bad or [])
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def reward(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The exit code."""
    monkeypatch.setattr(sys, "argv", ["posttrain", "reward", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def test_outcomes_and_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "answers.jsonl", ROWS, BAD)
    assert reward(monkeypatch, file, "--json", "--explain", "--workers", "2") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["outcomes"] == {
        "correct": 2,
        "wrong": 1,
        "unparsable": 1,
        "truncated": 1,
        "limit": 0,
        "infrastructure": 0,
    }
    assert (found["rows"], found["mean_correctness"], found["mean_value"]) == (5, 0.4, 0.4)
    assert [row["outcome"] for row in found["rewards"]] == [
        "correct",
        "wrong",
        "unparsable",
        "truncated",
        "correct",
    ]
    assert found["rewards"][1]["explanation"] == "'3' is not the reference"
    assert [entry["row"] for entry in found["rejected"]] == list(range(6, 17))
    kept = [json.loads(line) for line in Path(found["quarantine"]).read_text().splitlines()]
    assert [(row["file"], row["row"]) for row in kept] == [(str(file), n) for n in range(6, 17)]
    for row, message in zip(
        kept,
        [
            "no JSON",
            "a JSON object was expected",
            "no UTF-8 text",
            "no usable JSON ('utf-8' codec can't encode",
            "no usable JSON ('answer' stands there twice)",
            "'completion' is missing",
            "neither 'question' nor 'messages'",
            "'question' must be a text, got 5",
            "the reference must be a string, got 2",
            "'nope'; there are code",
            "a turn is {role: text, content: text}",
        ],
        strict=True,
    ):
        assert message in row["reason"]
    assert kept[5]["content"] == BAD[5].decode()


def test_what_a_person_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "answers.jsonl", ROWS[:2])
    quarantine = tmp_path / "answers.jsonl.quarantined.jsonl"
    quarantine.write_text("of an earlier call")
    assert reward(monkeypatch, file, "--explain") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["row 1: 1 correct", "row 2: 0 wrong: '3' is not the reference"]
    (correct,) = [line.replace("│", "").split() for line in lines if "50.0%" in line][:1]
    assert correct == ["correct", "1", "50.0%"]
    assert "mean correctness: 0.5" in lines
    assert not quarantine.exists()


def test_one_verifier_for_every_row_with_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "chat.jsonl", [*ROWS[:2], {**ROWS[0], "verifier": "maths"}])
    config = tmp_path / "settings.yaml"
    with serve(lambda told: '{"score": 2, "reason": "dull"}') as endpoint:
        config.write_text(
            json.dumps(
                {
                    "stages": ["not", "looked", "at"],
                    "rewards": {"judge": {"endpoint": {"url": endpoint.url, "model": "m"}}},
                }
            )
        )
        assert (
            reward(
                monkeypatch, file, "--verifier", "judge", "--config", config, "--json", "--explain"
            )
            == 0
        )
    found = json.loads(capsys.readouterr().out)
    assert found["mean_correctness"] == 0.25
    assert [row["explanation"] for row in found["rewards"]] == ["2 of 5: dull"] * 3


def test_a_judge_that_is_away_is_no_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "chat.jsonl", ROWS[:1])
    config = tmp_path / "settings.yaml"
    endpoint = {"url": "http://127.0.0.1:9/v1", "model": "m"}
    config.write_text(json.dumps({"rewards": {"judge": {"endpoint": endpoint, "retries": 0}}}))
    assert reward(monkeypatch, file, "--verifier", "judge", "--config", config) == 3
    last = capsys.readouterr().err.splitlines()[-1]
    assert "not one of 1 rows could be scored: http://127.0.0.1:9" in last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl is no file"),
        (["bad.jsonl"], "bad.jsonl has no row that can be scored; row 1: no JSON"),
        (["mixed.jsonl", "--strict"], "mixed.jsonl, row 2: no JSON"),
        (["mixed.jsonl", "--verifier", "nope"], "--verifier nope: there are code, exact"),
        (["mixed.jsonl", "--verifier", "judge"], "need a section `rewards`"),
        (["mixed.jsonl", "--config", "none.yaml"], "none.yaml cannot be read"),
        (["mixed.jsonl", "--config", "typo.yaml"], "typo.yaml: rewards: custm: unknown setting"),
        (["mixed.jsonl", "--config", "own.yaml"], "custom.own = no_such:f: no_such cannot be"),
    ],
)
def test_bad_input_ends_with_2_before_anything_is_started(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("bad.jsonl"), [], [b"{"])
    write(Path("mixed.jsonl"), ROWS[:1], [b"{"])
    Path("typo.yaml").write_text("rewards: {custm: {}}")
    Path("own.yaml").write_text("rewards: {custom: {own: 'no_such:f'}}")
    assert reward(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
