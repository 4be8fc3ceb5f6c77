"""How a teacher's word joins the advantages."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from posttrain.kinds import check_given, default_of

WeightKind = Literal["dynamic", "constant"]
READS: Mapping[WeightKind, Mapping[str, float]] = {
    "dynamic": {"slope": 5.0, "offset": 0.0, "min_lead": 0.1, "memory": 0.9},
    "constant": {"coefficient": 0.1},
}
"""What each kind of weight reads, with its defaults."""


_default = partial(default_of, "weight", READS)


class OnlineDistillationSettings(BaseModel):
    """How the teacher's word joins the advantages.

    - `weight`: *dynamic* takes λ = clip(σ(`slope`·EMA[CE_student − CE_teacher] + `offset`),
      `min_lead`, 1), over the tokens of right answers, before they are trained on; *constant*
      takes `coefficient`.
    - `reward_weight`: of the rewards' own advantages. 0 leaves them out: pure on-policy
      distillation, and groups with equal rewards are trained too.
    - `deadline_s`: from the moment in which the gate admits a group; without an answer by then it
      is trained on its rewards alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: WeightKind = "dynamic"
    coefficient: float | None = Field(default_factory=_default("coefficient"), ge=0)
    slope: float | None = Field(default_factory=_default("slope"), gt=0)
    offset: float | None = Field(default_factory=_default("offset"))
    min_lead: float | None = Field(default_factory=_default("min_lead"), ge=0, le=1)
    memory: float | None = Field(default_factory=_default("memory"), ge=0, lt=1)
    reward_weight: float = Field(default=1.0, ge=0)
    deadline_s: float = Field(default=60.0, gt=0)

    @model_validator(mode="after")
    def _what_is_given_is_read(self) -> Self:
        check_given(self, "weight", READS)
        return self
