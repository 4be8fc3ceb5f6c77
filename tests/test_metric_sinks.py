"""TensorBoard and Weights & Biases through one hook."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain.errors import SettingsError
from posttrain.metric_sinks import LogSettings, check_sinks, open_sinks, scalars
from posttrain.metrics import MetricsLog, read_metrics

STEP = {"stage": "rl", "step": 3, "pass@1": 0.5, "pool": {"sums": {"dropped": 2}}, "note": "x"}


def test_numbers_of_records_with_a_step() -> None:
    assert scalars(STEP) == {"rl/pass@1": 0.5, "rl/pool/sums/dropped": 2.0}
    assert scalars({"stage": "rl", "event": "evaluation", "step": 4, "all": {"k": 1}}) == {
        "rl/evaluation/all/k": 1.0
    }
    assert scalars({"stage": "sft", "event": "done", "seconds": 3.0}) == {}


def test_tensorboard_gets_what_the_file_gets(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    log = MetricsLog(tmp_path / "m.jsonl", open_sinks(LogSettings(tensorboard=True), tmp_path))
    log.append(STEP)
    log.append({"stage": "sft", "event": "done"})
    log.close()
    assert len(read_metrics(tmp_path / "m.jsonl")) == 2
    (file,) = (tmp_path / "tensorboard").iterdir()
    content, found = file.read_bytes(), {}
    while content:  # length, its checksum, the event, its checksum
        size = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + size])
        found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
        content = content[16 + size :]
    assert found == {("rl/pass_1", 3): 0.5, ("rl/pool/sums/dropped", 3): 2.0}


def test_wandb_gets_one_run_named_after_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    logged: list[Any] = []
    run = SimpleNamespace(log=logged.append, finish=lambda: logged.append("finished"))

    def init(**keywords: Any) -> Any:
        logged.append(keywords)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    directory = tmp_path / "run7"
    directory.mkdir()
    (sink,) = open_sinks(LogSettings(wandb="mine"), directory)
    sink.write(STEP)
    sink.write({"stage": "sft", "event": "done"})
    sink.close()
    begun = {
        "project": "mine",
        "name": "run7",
        "id": (directory / "wandb_id").read_text(),
        "dir": str(directory),
        "resume": "allow",
    }
    assert len(begun["id"]) == 16
    assert logged == [
        begun,
        {"rl/pass@1": 0.5, "rl/pool/sums/dropped": 2.0, "step": 3},
        "finished",
    ]
    open_sinks(LogSettings(wandb="mine"), directory)  # the run goes on
    assert logged[-1] == begun
    (tmp_path / "other").mkdir()
    open_sinks(LogSettings(wandb="mine"), tmp_path / "other")
    assert logged[-1]["id"] != begun["id"]
    monkeypatch.setenv("WANDB_MODE", "offline")  # each start is a run of its own
    open_sinks(LogSettings(wandb="mine"), directory)
    assert logged[-1] == {"project": "mine", "name": "run7", "dir": str(directory)}


@pytest.mark.parametrize(
    ("settings", "package"),
    [(LogSettings(wandb="mine"), "wandb"), (LogSettings(tensorboard=True), "tensorboardX")],
)
def test_a_package_that_is_not_there_is_named(
    settings: LogSettings, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SettingsError, match=f"needs the package {package}: pip install {package}"):
        check_sinks(settings)
    check_sinks(LogSettings())
