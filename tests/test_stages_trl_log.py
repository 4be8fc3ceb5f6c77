"""A trainer's log on its way to the driver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain.stages import trl_log
from posttrain.stages.trl_log import followed, write_record


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl_log, "POLL_S", 0.001)


def test_what_is_written_meanwhile_is_handed_over_once_and_whole(tmp_path: Path) -> None:
    file = tmp_path / "trainer" / "log.jsonl"
    write_record(file, {"step": 1})
    found: list[Any] = []
    with followed(file, found.append):
        write_record(file, {"step": 2})
        with file.open("a") as log:
            log.write('{"step"')
            log.flush()
            log.write(": 3}\n")
        write_record(file, {"step": 4, "loss": 0.5})
    assert found == [{"step": 2}, {"step": 3}, {"step": 4, "loss": 0.5}]


def test_a_file_that_never_comes_says_nothing(tmp_path: Path) -> None:
    with followed(tmp_path / "log.jsonl", pytest.fail):
        pass


def test_what_goes_wrong_with_a_record_is_raised(tmp_path: Path) -> None:
    def full(_: Any) -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"), followed(tmp_path / "log.jsonl", full):
        write_record(tmp_path / "log.jsonl", {"step": 1})
