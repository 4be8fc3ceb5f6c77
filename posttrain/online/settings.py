"""Settings of the asynchronous loop."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from posttrain.advantages import AdvantageKind


def _forty_steps_of_draws(earlier_fields: dict[str, Any]) -> int:
    return 40 * int(earlier_fields["groups_per_step"])


class LoopSettings(BaseModel):
    """How much is drawn, how stale it may become and when it is given up.

    `num_steps` counts every optimizer step of the stage, those before a resume included.
    `max_lag` S says how many optimizer steps a group's oldest token may lie behind the weights it
    trains; 0 is lock-step: the learner waits for the generators and they for it. `straggler_lag`
    adds to that bound, and not to what is in flight: for so many more steps a slow group may be
    overtaken (see `posttrain.online.admission`).
    `draw_deadline_s` runs from a prompt's dispatch to its scores. `starvation_draws` is how many
    draws in a row may end without a trainable group, by default those of 40 steps. `row_tokens`
    and `micro_tokens` size the packed rows and micro-batches (see `posttrain.packing`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_steps: int = Field(default=100, gt=0)
    group_size: int = Field(default=8, ge=2)
    groups_per_step: int = Field(default=16, gt=0)
    max_lag: int = Field(default=1, ge=0)
    straggler_lag: int = Field(default=0, ge=0)
    temperature: float = Field(default=1.0, gt=0)
    max_tokens: int = Field(default=512, gt=0)
    draw_deadline_s: float = Field(default=600.0, gt=0)
    starvation_draws: int = Field(default_factory=_forty_steps_of_draws, gt=0)
    advantage: AdvantageKind = "mean"
    row_tokens: int = Field(default=2048, gt=0)
    micro_tokens: int = Field(default=8192, gt=0)

    @model_validator(mode="after")
    def _nothing_is_overtaken_in_lock_step(self) -> Self:
        if self.max_lag == 0 and self.straggler_lag > 0:
            raise ValueError("straggler_lag needs max_lag above 0: in lock-step all groups leave")
        return self

    @model_validator(mode="after")
    def _starvation_waits_for_what_is_in_flight(self) -> Self:
        in_flight = (self.max_lag + 1) * self.groups_per_step
        if self.starvation_draws < in_flight:
            raise ValueError(
                f"starvation_draws = {self.starvation_draws} would end the run before the "
                f"{in_flight} draws that are in flight at once have been heard"
            )
        return self
