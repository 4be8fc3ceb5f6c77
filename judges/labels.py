"""When is a prompt's difficulty decided: labels as decisions on the Jeffreys posterior."""

from __future__ import annotations

from bisect import bisect_left
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from judges.estimators import beta_cdf, check_counts, posterior
from posttrain.types import Label

MOST_ANSWERS = 10_000
"""Beyond so many the posterior is not computed exactly, and nobody asks for them."""


class LabelSettings(BaseModel):
    """Bounds on the pass rate p, and the posterior probability that a label needs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    easy_above: float = Field(default=0.9, gt=0, lt=1)
    hard_below: float = Field(default=0.25, gt=0, lt=1)
    confidence: float = Field(default=0.9, gt=0.5, lt=1)

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.hard_below >= self.easy_above:
            raise ValueError(
                f"hard_below={self.hard_below} must lie below easy_above={self.easy_above}"
            )
        return self


def confident_label(n: int, c: int, settings: LabelSettings) -> Label | None:
    """Easy, hard or medium, whichever holds with the wanted confidence; None if none does.

    Without a single success nothing is decided: hard and unsolved prompts train so differently
    that the question stays open until the cap.
    """
    check_counts(n, c)
    if c == 0:
        return None
    a, b = posterior(n, c)
    below_hard = beta_cdf(settings.hard_below, a, b)
    below_easy = beta_cdf(settings.easy_above, a, b)
    if 1.0 - below_easy >= settings.confidence:
        return Label.EASY
    if below_hard >= settings.confidence:
        return Label.HARD
    if below_easy - below_hard >= settings.confidence:
        return Label.MEDIUM
    return None


def decided_by(n: int, c: int, cap: int, settings: LabelSettings) -> str:
    """Why sampling stopped after c of n right answers: the label holds with confidence, no more
    could be had, or it was clear on which side of a cut the prompt lies."""
    if confident_label(n, c, settings) is not None:
        return "confidence"
    return "cap" if n >= cap else "cut"


def easy_from(settings: LabelSettings) -> int:
    """How many answers, all of them right, it takes at least until a prompt is easy; `MOST_ANSWERS`
    where fewer do not suffice."""
    return bisect_left(
        range(MOST_ANSWERS),
        True,
        key=lambda n: confident_label(n, n, settings) is Label.EASY,
    )


def label(n: int, c: int, cap: int, settings: LabelSettings) -> Label | None:
    """The label after c of n correct answers, or None: go on sampling.

    At the cap (n ≥ cap) something is always said: `UNSOLVED` if c = 0, which never means
    impossible (0 of 16 leaves P(p < .01) at .43), else what is confident, else `MEDIUM`.
    """
    decided = confident_label(n, c, settings)
    if decided is not None or n < cap:
        return decided
    return Label.UNSOLVED if c == 0 else Label.MEDIUM
