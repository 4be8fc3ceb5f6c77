"""What a verifier is, and what it says about one answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from posttrain.types import Outcome, Prompt

_QUOTED = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A verifier's finding. `correctness` is in [0, 1]; `outcome` is the answer's own doing, never
    `INFRASTRUCTURE`: a verifier that cannot do its work raises instead.
    """

    correctness: float
    outcome: Outcome
    explanation: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.correctness <= 1:
            raise ValueError(f"correctness must be in [0, 1], got {self.correctness}")


@dataclass(frozen=True, slots=True)
class Unscored:
    """A verifier could not do its work, through no fault of the answer."""

    why: str


Finding = Score | Unscored

Verifier = Callable[[Prompt, str], Score]
"""(prompt, text of the whole completion) -> Score. Pure, picklable, and silent on stdout."""


def right() -> Score:
    return Score(correctness=1.0, outcome=Outcome.CORRECT)


def failed(outcome: Outcome, explanation: str) -> Score:
    """Correctness 0 with the outcome that says why."""
    return Score(correctness=0.0, outcome=outcome, explanation=explanation)


def unanswered() -> Score:
    return failed(Outcome.UNPARSABLE, "there is no `#` with an answer behind it")


def quote(text: str) -> str:
    """`text` as it appears in explanations and errors: its beginning, quoted."""
    return repr(text if len(text) <= _QUOTED else text[: _QUOTED - 1] + "…")
