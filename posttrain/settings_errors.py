"""What is wrong with settings, in words: the key, what was expected, the nearest known one."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, source: str, model: type[BaseModel]) -> str:
    """All that is wrong with a `model` that was read from `source`."""
    lines = [
        _describe(problem, model)
        for problem in error.errors()
        # A default that is derived from another setting says nothing when that one is wrong.
        if problem["type"] != "default_factory_not_called"
    ]
    return f"{source}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{source}:", *lines])


def _describe(problem: Mapping[str, Any], model: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    match problem["type"]:
        case "extra_forbidden":
            return f"{key}: unknown setting.{_nearest(problem['loc'], model)}"
        case "missing":
            return f"{key}: must be set, there is no default"
        case "model_type":
            return f"{key}: a section of settings was expected, got {problem['input']!r}"
        case "value_error":
            reason = str(problem["ctx"]["error"])
            return f"{key}: {reason}" if key else reason
        case _:
            return f"{key}: {problem['msg']}, got {problem['input']!r}"


def _nearest(location: Sequence[int | str], model: type[BaseModel]) -> str:
    """The known setting most like an unknown one: misspelt here, or of that name elsewhere."""
    *section, wrong = [part for part in location if isinstance(part, str)]
    known = [key.split(".") for key in sorted(_known_keys(model))]
    siblings = [key[-1] for key in known if key[:-1] == section]
    if close := difflib.get_close_matches(wrong, siblings, n=1, cutoff=0.7):
        return f" Did you mean {'.'.join([*section, *close])}?"
    elsewhere = [key for key in known if key[-1] == wrong]
    if elsewhere:
        nearest = min(elsewhere, key=lambda key: (-_shared_sections(key, section), len(key)))
        return f" Did you mean {'.'.join(nearest)}?"
    return f" Known here: {', '.join(siblings)}."


def _shared_sections(key: Sequence[str], section: Sequence[str]) -> int:
    pairs = zip(key, section, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _known_keys(model: type[BaseModel], prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for name, field in model.model_fields.items():
        keys.add(prefix + name)
        for nested in _models_in(field.annotation):
            keys |= _known_keys(nested, f"{prefix}{name}.")
    return keys


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
