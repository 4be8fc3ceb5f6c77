"""Settings of the stages that TRL trains: SFT and DPO."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from posttrain.data.pairs import MiningSettings
from posttrain.data.sources import SourceSettings
from posttrain.losses.distillation_settings import DistillationSettings

OWNED = {
    "output_dir": "it lies in the run's directory",
    "deepspeed": "it is a table of its own, beside `trainer`",
    "use_cpu": "where there is no GPU the CPU is taken anyway",
}
"""Of TRL's settings, those that a run decides."""


class BudgetSettings(BaseModel):
    """How much is trained: passes over the rows, optimizer steps, or tokens (those of prompts
    included). One of the three."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if sum(value is not None for value in (self.epochs, self.steps, self.tokens)) != 1:
            raise ValueError("give one of epochs, steps and tokens")
        return self


class TrainerSettings(BaseModel):
    """`trainer` reaches TRL's own configuration unchanged, `deepspeed` the engine's.

    Without a `budget`, and without `max_steps` or `num_train_epochs` in `trainer`, each row is
    seen once: light.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: BudgetSettings | None = None
    trainer: dict[str, Any] = {}
    deepspeed: dict[str, Any] = {}
    threads: int = Field(default=1, gt=0, description="CPU threads of a rank, without a GPU")

    @field_validator("trainer")
    @classmethod
    def _not_what_a_run_decides(cls, trainer: dict[str, Any]) -> dict[str, Any]:
        for key in trainer:
            if key in OWNED:
                raise ValueError(f"{key} cannot be set here: {OWNED[key]}")
        return trainer

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        said_twice = sorted({"max_steps", "num_train_epochs"} & self.trainer.keys())
        if self.budget is not None and said_twice:
            raise ValueError(f"budget and trainer.{said_twice[0]} both say how much; leave one out")
        return self


class CheckpointSettings(BaseModel):
    """Which of the policies saved in the course of training is kept.

    `count` are saved, at even distances and at the end. With more than one, each answers the first
    `prompts` held-out tasks as the section `eval` says. Of those whose pass@k for the largest k has
    fallen by at most `max_fall` from the policy that came in, the one with the best pass@k for the
    smallest k stays: a higher pass@1 that is paid for with pass@8 is over-constraint, and RL would
    find less to explore.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int = Field(default=3, gt=0)
    prompts: int = Field(default=128, gt=0)
    max_fall: float = Field(default=0.02, ge=0, le=1)


class SFTSettings(TrainerSettings):
    """Light supervised fine-tuning on the rows of `data` that screening kept. `model` is what the
    stage starts from, by default what the stage before it left. With `distillation` a teacher says
    beside each label what else it would have written."""

    model: str | None = None
    data: SourceSettings | None = None
    distillation: DistillationSettings | None = None
    checkpoints: CheckpointSettings = CheckpointSettings()


class GuardSettings(BaseModel):
    """The policy that came in stays if held-out pass@1 falls by more than `max_fall`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_fall: float = Field(default=0.02, ge=0, le=1)


class DPOSettings(TrainerSettings):
    """Light DPO on pairs mined from the policy that enters the stage (`mining`, null for none) and
    on pairs of one's own (`data`, JSON lines with `prompt`, `chosen` and `rejected`). `model` is
    that policy, by default what the stage before it left."""

    model: str | None = None
    data: SourceSettings | None = None
    mining: MiningSettings | None = MiningSettings()
    guard: GuardSettings = GuardSettings()

    @model_validator(mode="after")
    def _pairs_come_from_somewhere(self) -> Self:
        if self.mining is None and self.data is None:
            raise ValueError("without mining and without data there are no pairs; give one")
        return self
