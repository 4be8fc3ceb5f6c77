"""Where a run's numbers go besides metrics.jsonl: TensorBoard, Weights & Biases, by one hook."""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from posttrain.atomic import write_atomically
from posttrain.errors import SettingsError
from posttrain.metrics import MetricSink

WANDB_ID = "wandb_id"
"""File of a run's directory."""


class LogSettings(BaseModel):
    """`tensorboard` writes event files into the run's `tensorboard/`; `wandb` names a project of
    Weights & Biases (WANDB_MODE=offline works; each start is a run there then)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensorboard: bool = False
    wandb: str | None = Field(default=None, min_length=1)


class TensorBoardSink:
    """Scalars by stage and step; records without a step have no place on its axis."""

    def __init__(self, directory: Path) -> None:
        self._writer = _module("tensorboardX", "log.tensorboard").SummaryWriter(str(directory))

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """One run of the project, named after the run's directory, resumed by the id kept there.
    Offline nothing is resumed: starts that are synced under one id lose history to one another, so
    each is a run of its own, of the same name."""

    def __init__(self, project: str, directory: Path) -> None:
        self._run = _module("wandb", "log.wandb").init(
            project=project,
            name=directory.name,
            dir=str(directory),
            **_resumed(directory),
        )

    def write(self, record: Mapping[str, Any]) -> None:
        if values := scalars(record):
            # Its own step may not go back; after a resume ours does.
            self._run.log(values | {"step": record["step"]})

    def close(self) -> None:
        self._run.finish()


def open_sinks(settings: LogSettings, directory: Path) -> list[MetricSink]:
    """Raises SettingsError for one whose package is not installed."""
    sinks: list[MetricSink] = []
    if settings.tensorboard:
        sinks.append(TensorBoardSink(directory / "tensorboard"))
    if settings.wandb is not None:
        sinks.append(WandbSink(settings.wandb, directory))
    return sinks


def check_sinks(settings: LogSettings) -> None:
    """Raises SettingsError as `open_sinks` would, and starts nothing."""
    if settings.tensorboard:
        _module("tensorboardX", "log.tensorboard")
    if settings.wandb is not None:
        _module("wandb", "log.wandb")


def scalars(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a record that has a step, as `stage/event/name`, tables flattened."""
    if not prefix:
        if record.get("step") is None:
            return {}
        prefix = "/".join(str(record[key]) for key in ("stage", "event") if key in record)
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}/{name}")
        elif isinstance(value, int | float) and name != "step":
            found[f"{prefix}/{name}"] = float(value)
    return found


def _resumed(directory: Path) -> dict[str, str]:
    if os.environ.get("WANDB_MODE") == "offline":
        return {}
    return {"id": _kept_id(directory / WANDB_ID), "resume": "allow"}


def _kept_id(file: Path) -> str:
    """Made at the first start: a directory of the same name elsewhere, or started over, is another
    run."""
    if not file.exists():
        write_atomically(file, secrets.token_hex(8))
    return file.read_text(encoding="utf-8").strip()


def _module(name: str, key: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SettingsError(f"{key} needs the package {name}: pip install {name}") from error
