"""Which of the policies saved in the course of SFT is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Mean pass@k on held-out tasks for the smallest k (`accuracy`) and the largest (`reach`: what
    is still found among many tries)."""

    accuracy: float
    reach: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """`over_constrained` are the steps at which `reach` had fallen by more than it may."""

    step: int
    over_constrained: Sequence[int]


def choose(entered: Measured, saved: Mapping[int, Measured], max_fall: float) -> Choice:
    """Of those that are not over-constrained the most accurate; if all are, the one with the
    largest reach. Of equals the earliest, which was trained least."""
    over = [step for step, found in saved.items() if entered.reach - found.reach > max_fall]
    sound = [step for step in saved if step not in over]

    def preference(step: int) -> tuple[float, int]:
        found = saved[step]
        return (found.accuracy if sound else found.reach), -step

    return Choice(step=max(sound or saved, key=preference), over_constrained=sorted(over))
