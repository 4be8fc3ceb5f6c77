"""System instructions: drawn by weight for each group, looked up by name."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from posttrain.errors import DataError
from posttrain.types import SystemInstruction


class InstructionSettings(BaseModel):
    """One entry of `system_instructions`. Without `text`, no system message is shown: the entry
    says how often."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    text: str | None = None
    weight: float = Field(default=1.0, ge=0)
    pattern: str | None = None

    @model_validator(mode="after")
    def _pattern_can_be_checked(self) -> Self:
        if self.pattern is None:
            return self
        if self.text is None:
            raise ValueError("a pattern needs a text: what is not shown cannot be followed")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"{self.pattern!r} is no regular expression: {error}") from error
        return self


class InstructionMix:
    """Draws a system instruction, or None, with the declared weights.

    The seed and a draw's number decide, not what was drawn before: nothing needs to be saved.
    """

    def __init__(self, entries: Sequence[InstructionSettings], seed: int) -> None:
        self.by_name = {
            e.name: SystemInstruction(name=e.name, text=e.text, weight=e.weight, pattern=e.pattern)
            for e in entries
            if e.text is not None
        }
        self._choices = [self.by_name.get(e.name) for e in entries] or [None]
        self._weights = [e.weight for e in entries] or [1.0]
        self._seed = seed

    def draw(self, number: int) -> SystemInstruction | None:
        """That of draw `number`; the same one whenever it is asked for."""
        generator = random.Random(f"{self._seed}:{number}")
        return generator.choices(self._choices, self._weights)[0]

    def resolve(self, name: str | None) -> SystemInstruction | None:
        """The instruction of that name; None for None. Raises DataError for an unknown name."""
        if name is None:
            return None
        if name not in self.by_name:
            known = ", ".join(self.by_name) or "none"
            raise DataError(f"system_instructions has no {name!r} with a text, only: {known}")
        return self.by_name[name]
