"""The tables that go to TRL unchanged, checked against TRL before anything is started."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_type_hints

from posttrain.config import Settings
from posttrain.errors import SettingsError

Kind = Literal["sft", "dpo"]


def trainer_classes(kind: Kind) -> tuple[type[Any], type[Any]]:
    """TRL's configuration and trainer of a stage."""
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    return {"sft": (SFTConfig, SFTTrainer), "dpo": (DPOConfig, DPOTrainer)}[kind]


def check_trainers(settings: Settings) -> None:
    """Raises SettingsError for a key of a stage's `trainer` table that TRL does not know, or a
    value that it does not take."""
    if "sft" in settings.stages and settings.sft.trainer:
        check_trainer_settings("sft", settings.sft.trainer)
    if "dpo" in settings.stages and settings.dpo.trainer:
        check_trainer_settings("dpo", settings.dpo.trainer)


def check_trainer_settings(kind: Kind, trainer: Mapping[str, Any]) -> None:
    """Raises SettingsError for a key that TRL does not know, naming the nearest it knows, and for
    values of which no configuration can be made."""
    config_class, _ = trainer_classes(kind)
    known = [field.name for field in dataclasses.fields(config_class)]
    for key in trainer:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise SettingsError(
                f"{kind}.trainer.{key}: TRL's {config_class.__name__} has no such setting.{hint}"
            )
    _refuse_other_types(kind, config_class, trainer)


def _refuse_other_types(kind: Kind, config_class: type[Any], trainer: Mapping[str, Any]) -> None:
    """TRL's configurations are dataclasses: they take a text where a number is meant, and fail in
    the midst of training. What is no plain number they check themselves."""
    from pydantic import TypeAdapter, ValidationError

    hints = get_type_hints(config_class)
    for key, value in trainer.items():
        if not set(get_args(hints[key]) or (hints[key],)) <= {int, float, bool, type(None)}:
            continue
        try:
            TypeAdapter(hints[key]).validate_python(value, strict=isinstance(value, str))
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise SettingsError(f"{kind}.trainer.{key}: {problem}, got {value!r}") from error
