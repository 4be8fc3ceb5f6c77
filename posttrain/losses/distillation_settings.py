"""How the teacher's word is weighed against the label's, apart from its code so that torch is not
needed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from posttrain.kinds import check_given, default_of

WeightKind = Literal["dynamic", "constant", "ce_only"]
Divergence = Literal["forward_kl", "reverse_kl"]

READS: Mapping[WeightKind, Mapping[str, float]] = {
    "dynamic": {
        "slope": 20.0,
        "offset": 4.0,
        "min_lead": 0.1,
        "prior": 0.9,
        "margin": 2.3,
        "memory": 0.9,
    },
    "constant": {"alpha": 0.5},
    "ce_only": {},
}
"""What each kind of weight reads, with its defaults."""


_default = partial(default_of, "weight", READS)


class DistillationSettings(BaseModel):
    """L = Σ [(1−α)·CE(y, p) + α·τ²·KL(q^τ ‖ p^τ)] / Σ_global, over the tokens of the labels y.

    - `weight`: *dynamic* takes α = λ·responsibility from `posttrain.losses.teacher_weight`,
      *constant* takes `alpha`, *ce_only* 0: then no teacher is asked.
    - `divergence`: *forward_kl* spreads the student over all that the teacher would say;
      *reverse_kl*, KL(p ‖ q), lets it pick. That needs q beside what was drawn from it, hence
      `teacher.targets.kind = top_k`.
    - dynamic: λ = clip(σ(`slope`·EMA[CE_student − CE_teacher] + `offset`), `min_lead`, 1) on
      `held_out` rows that are not trained on, measured every `every_steps` steps over the labels
      that the teacher is responsible for. By default that is .98 for a teacher as good as the
      student, whose soft targets then say no more than the student knows, and .5 where the student
      is .2 nats ahead. `prior` is how reliable a teacher counts in a domain before anything is
      known, `margin` how many nats better the critic may explain a label before that speaks against
      the teacher, and `memory` what both EMAs keep of their last value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: WeightKind = "dynamic"
    alpha: float | None = Field(default_factory=_default("alpha"), ge=0, le=1)
    divergence: Divergence = "forward_kl"
    slope: float | None = Field(default_factory=_default("slope"), gt=0)
    offset: float | None = Field(default_factory=_default("offset"))
    min_lead: float | None = Field(default_factory=_default("min_lead"), ge=0, le=1)
    prior: float | None = Field(default_factory=_default("prior"), gt=0, lt=1)
    margin: float | None = Field(default_factory=_default("margin"), ge=0)
    memory: float | None = Field(default_factory=_default("memory"), ge=0, lt=1)
    held_out: int = Field(default=64, gt=0, description="rows")
    every_steps: int = Field(default=5, gt=0)

    @model_validator(mode="after")
    def _what_is_given_is_read(self) -> Self:
        check_given(self, "weight", READS)
        return self
