"""What the roles beside the learner do with their time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """How to measure one.

    - `idle_share`: of the time since it was last asked; None where the role has no device of its
      own.
    - `tokens`: that it has read or written in all; None where the loop counts them.
    """

    idle_share: Callable[[], float] | None = None
    tokens: Callable[[], int] | None = None


class RoleTimes:
    """Measures roles from step to step."""

    def __init__(self, roles: Mapping[str, Role]) -> None:
        self._idle = {name: r.idle_share for name, r in roles.items() if r.idle_share is not None}
        self._tokens = {name: r.tokens for name, r in roles.items() if r.tokens is not None}
        self._before: dict[str, int] = {}
        self._asked_at = 0.0
        self.metrics()  # what was before the first step is no part of it

    def metrics(self) -> dict[str, float]:
        """Since this was last asked: `ROLE_idle_share`, `ROLE_tokens_per_s`."""
        now = time.monotonic()
        seconds, self._asked_at = now - self._asked_at, now
        counted = {name: tokens() for name, tokens in self._tokens.items()}
        speeds = {
            f"{name}_tokens_per_s": (count - self._before.get(name, 0)) / seconds
            for name, count in counted.items()
        }
        self._before = counted
        return {f"{name}_idle_share": share() for name, share in self._idle.items()} | speeds
