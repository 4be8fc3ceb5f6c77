"""How the teacher's word is weighed against the label's, apart from its code so that torch is not
needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

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


def _of_the_kind(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda earlier_fields: READS[earlier_fields["weight"]].get(name)


def check_given(settings: BaseModel, weight: str, reads: Mapping[Any, Mapping[str, float]]) -> None:
    """Raises ValueError unless exactly those settings have a value that `weight` reads."""
    read = reads[weight]
    names = {name for kind in reads.values() for name in kind}
    given = {name for name in names if getattr(settings, name) is not None}
    for name in sorted(given ^ read.keys()):
        raise ValueError(
            f"weight = {weight} needs {name}, got none"
            if name in read
            else f"weight = {weight} does not read {name}, remove it"
        )


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
    alpha: float | None = Field(default_factory=_of_the_kind("alpha"), ge=0, le=1)
    divergence: Divergence = "forward_kl"
    slope: float | None = Field(default_factory=_of_the_kind("slope"), gt=0)
    offset: float | None = Field(default_factory=_of_the_kind("offset"))
    min_lead: float | None = Field(default_factory=_of_the_kind("min_lead"), ge=0, le=1)
    prior: float | None = Field(default_factory=_of_the_kind("prior"), gt=0, lt=1)
    margin: float | None = Field(default_factory=_of_the_kind("margin"), ge=0)
    memory: float | None = Field(default_factory=_of_the_kind("memory"), ge=0, lt=1)
    held_out: int = Field(default=64, gt=0, description="rows")
    every_steps: int = Field(default=5, gt=0)

    @model_validator(mode="after")
    def _what_is_given_is_read(self) -> Self:
        check_given(self, self.weight, READS)
        return self
