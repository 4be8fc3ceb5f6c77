"""What could not be read: raised at once, or collected beside what could."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from posttrain.errors import PosttrainError

OnError = Literal["raise", "collect"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A file of the run, or a line of it, that is left out, and why."""

    source: Path
    message: str


class Problems:
    """Keeps them, or lets the first one through."""

    def __init__(self, on_error: OnError) -> None:
        if on_error not in ("raise", "collect"):
            raise ValueError(f"on_error is 'raise' or 'collect', got {on_error!r}")
        self.found: list[Problem] = []
        self._collect = on_error == "collect"

    def note(self, source: Path, error: PosttrainError) -> None:
        """Raises `error` unless problems are collected."""
        if not self._collect:
            raise error
        self.found.append(Problem(source=source, message=str(error)))

    def reading(self, source: Path, read: Callable[[], T], otherwise: T) -> T:
        """`read()`, or `otherwise` where it raises an error of ours and problems are collected."""
        try:
            return read()
        except PosttrainError as error:
            self.note(source, error)
            return otherwise
