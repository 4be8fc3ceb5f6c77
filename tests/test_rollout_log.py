"""Groups on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from online_fakes import make_group

from posttrain import rollout_log
from posttrain.rollout_log import RolloutLog, rows_of
from posttrain.types import DrawOutcome, PolicyVersion, VersionSpan


def test_every_answer_is_a_row(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path / "rollouts", attempt=2)
    group = make_group(
        "1?",
        draw_id="d1-7",
        system="brief",
        version=PolicyVersion(1, 3),
        components={"length": -0.5},
    )
    log.append(group, DrawOutcome.TRAINED)
    log.flush()
    (file,) = (tmp_path / "rollouts").iterdir()
    assert file.name == "002-00000.parquet"
    first, second = pq.read_table(file).to_pylist()
    assert first == {
        "draw_id": "d1-7",
        "prompt_id": "p0",
        "domain": "toy",
        "system": "brief",
        "outcome": "trained",
        "text": "1",
        "num_tokens": 2,
        "finish_reason": "stop",
        "reward": 1.0,
        "correctness": 1.0,
        "reward_outcome": "correct",
        "components": '{"length": -0.5}',
        "oldest_version": "1.3",
        "newest_version": "1.3",
        "version_spans": '[[0, 2, "1.3"]]',
        "sampling": '{"max_tokens": 8, "temperature": 1.0, "top_p": 1.0, "seed": null}',
    }
    assert (second["reward"], second["correctness"]) == (None, None)
    assert list(first) == list(rows_of(group, DrawOutcome.TRAINED)[0])
    assert second["reward_outcome"] == "infrastructure"


def test_files_have_one_schema_whatever_is_absent_in_one_of_them(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path, attempt=1)
    for system, marks in ((None, "??"), ("brief", "10")):
        log.append(make_group(marks, system=system), DrawOutcome.ERRORED)
        log.flush()
    first, second = (pq.read_schema(f) for f in sorted(tmp_path.iterdir()))
    assert first.equals(second)


def test_files_are_bounded_and_an_empty_flush_writes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_log, "GROUPS_PER_FILE", 3)
    log = RolloutLog(tmp_path, attempt=1)
    for number in range(7):
        log.append(make_group("01", draw_id=f"d1-{number}"), DrawOutcome.ZERO_ADVANTAGE)
    log.flush()
    log.flush()
    rows = [pq.read_table(f).num_rows for f in sorted(tmp_path.iterdir())]
    assert rows == [6, 6, 2]


def test_every_span_of_an_answer_is_kept() -> None:
    """It may have been written by several versions, while weights were published."""
    group = make_group("1")
    spans = (VersionSpan(0, 1, PolicyVersion(1, 3)), VersionSpan(1, 2, PolicyVersion(1, 4)))
    group = replace(group, rollouts=(replace(group.rollouts[0], version_spans=spans),))
    (row,) = rows_of(group, DrawOutcome.TRAINED)
    assert json.loads(row["version_spans"]) == [[0, 1, "1.3"], [1, 2, "1.4"]]
    assert (row["oldest_version"], row["newest_version"]) == ("1.3", "1.4")


def test_a_file_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, synced = tmp_path / "rollouts", []
    monkeypatch.setattr(
        rollout_log,
        "fsync_path",
        lambda path: synced.append((path, [file.name for file in directory.iterdir()])),
    )
    log = RolloutLog(directory, attempt=1)
    log.append(make_group("1"), DrawOutcome.TRAINED)
    log.flush()
    name = "001-00000.parquet"
    partial = f".{name}.partial"
    assert synced == [
        (directory / partial, [partial]),
        (directory, [name]),
        (tmp_path, [name]),  # the directory is new
    ]
