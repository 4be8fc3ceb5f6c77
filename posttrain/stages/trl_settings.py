"""The tables that go to TRL unchanged, checked against TRL before anything is started."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal

from posttrain.config import Settings
from posttrain.errors import SettingsError

Kind = Literal["sft", "dpo"]


def check_trainers(settings: Settings) -> None:
    """Raises SettingsError for a key of a stage's `trainer` table that TRL does not know."""
    if "sft" in settings.stages and settings.sft.trainer:
        check_trainer_settings("sft", settings.sft.trainer)
    if "dpo" in settings.stages and settings.dpo.trainer:
        check_trainer_settings("dpo", settings.dpo.trainer)


def check_trainer_settings(kind: Kind, trainer: Mapping[str, Any]) -> None:
    """Raises SettingsError for a key that TRL does not know and names the nearest it knows."""
    from trl import DPOConfig, SFTConfig

    config_class = {"sft": SFTConfig, "dpo": DPOConfig}[kind]
    known = [field.name for field in dataclasses.fields(config_class)]
    for key in trainer:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise SettingsError(
                f"{kind}.trainer.{key}: TRL's {config_class.__name__} has no such setting.{hint}"
            )
