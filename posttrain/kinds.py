"""Settings of which each kind reads some: their defaults, and that no others are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel

Reads = Mapping[Any, Mapping[str, Any]]
"""What each kind reads, with its defaults."""


def default_of(by: str, reads: Reads, name: str) -> Callable[[dict[str, Any]], Any]:
    """A default factory for the field `name`, behind the field `by` that says the kind."""
    return lambda earlier_fields: reads[earlier_fields[by]].get(name)


def check_given(settings: BaseModel, by: str, reads: Reads) -> None:
    """Raises ValueError unless exactly those settings have a value that the kind reads."""
    kind = getattr(settings, by)
    read = reads[kind]
    names = {name for of_one in reads.values() for name in of_one}
    given = {name for name in names if getattr(settings, name) is not None}
    for name in sorted(given ^ read.keys()):
        raise ValueError(
            f"{by} = {kind} needs {name}, got none"
            if name in read
            else f"{by} = {kind} does not read {name}, remove it; it reads "
            f"{' and '.join(read) or 'none of these'}"
        )
