"""Which policy loss and within which bounds, apart from its code so that torch is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from posttrain.kinds import check_given, default_of

LossKind = Literal["cispo", "grpo", "dr_grpo", "dapo", "gspo"]

BOUNDS: Mapping[LossKind, Mapping[str, float]] = {
    "cispo": {"c_max": 5.0},
    "grpo": {"eps_low": 0.2, "eps_high": 0.2},
    "dr_grpo": {"eps_low": 0.2, "eps_high": 0.2},
    "dapo": {"eps_low": 0.2, "eps_high": 0.28},
    "gspo": {"eps_low": 3e-4, "eps_high": 4e-4},
}
"""The bounds on the ratio that each loss reads, with the values of its paper."""


_default = partial(default_of, "kind", BOUNDS)


class LossSettings(BaseModel):
    """The loss of the online learner; `posttrain.losses.objective` says what each kind is.

    `c_max` bounds CISPO's ratio, `eps_low` and `eps_high` clip that of the others to
    [1 − eps_low, 1 + eps_high]; by default as in the kind's paper, None where it reads none.

    The ratio is π_θ/π_rollout. With `tis_max` (2 is usual) the method keeps its own π_old instead:
    the ratio is π_θ/π_old, and the loss is weighted by min(π_old/π_rollout, tis_max).

    `kl_coefficient` weighs the k3 divergence per token from the policy that entered the stage,
    which then stays in memory beside the trained one; 0 does without.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: LossKind = "cispo"
    c_max: float | None = Field(default_factory=_default("c_max"), ge=1)
    eps_low: float | None = Field(default_factory=_default("eps_low"), gt=0, le=1)
    eps_high: float | None = Field(default_factory=_default("eps_high"), gt=0)
    tis_max: float | None = Field(default=None, ge=1)
    kl_coefficient: float = Field(default=0.0, ge=0)

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that this kind reads, by name."""
        given = {"c_max": self.c_max, "eps_low": self.eps_low, "eps_high": self.eps_high}
        return {name: bound for name, bound in given.items() if bound is not None}

    @model_validator(mode="after")
    def _bounds_fit_the_kind(self) -> Self:
        check_given(self, "kind", BOUNDS)
        return self
