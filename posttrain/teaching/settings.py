"""Who teaches, what is kept of its word, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from posttrain.kinds import check_given, default_of
from posttrain.losses.distillation_settings import DistillationSettings

TargetKind = Literal["sampled", "top_k"]

SIZES: Mapping[TargetKind, Mapping[str, int]] = {"sampled": {"samples": 50}, "top_k": {"k": 32}}
"""What each kind of target reads, with its default."""


_default = partial(default_of, "kind", SIZES)


class TargetSettings(BaseModel):
    """What is stored of the teacher's distribution q^τ at each token.

    - *sampled*: the counts of `samples` ids drawn from it. Their expectation is q^τ itself, so the
      gradient has no bias; about a dozen distinct ids a token for a large vocabulary.
    - *top_k*: the probabilities of the `k` likeliest ids, and of all others as one. Needed for
      reverse KL; exact once k reaches the vocabulary's size.

    `temperature` is τ. Label log-probabilities (at τ = 1) and the entropy are exact in both.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: TargetKind = "sampled"
    samples: int | None = Field(default_factory=_default("samples"), gt=0, le=65535)
    k: int | None = Field(default_factory=_default("k"), gt=0)
    temperature: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _what_is_given_is_read(self) -> Self:
        check_given(self, "kind", SIZES)
        return self


class TeacherSettings(BaseModel):
    """`model` is a checkpoint directory, a hub name, or `starter-teacher`, the one that ships; its
    tokenizer must be the policy's. `store` is the directory of its targets, which several runs may
    share; by default one below the run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(default=None, min_length=1)
    store: str | None = Field(default=None, min_length=1)
    targets: TargetSettings = TargetSettings()


def needs_teacher(section: BaseModel | None) -> bool:
    """Whether a stage with that section `distillation` asks one."""
    alone = isinstance(section, DistillationSettings) and section.weight == "ce_only"
    return section is not None and not alone


def check_learning(
    teacher: TeacherSettings, sections: Mapping[str, BaseModel | None], taught: Sequence[str]
) -> None:
    """ValueError for a teacher without anybody who learns from it, or the other way round.
    `sections` are the stages' own, `distillation`; in the stages `taught` a teacher is asked."""
    if taught and teacher.model is None:
        raise ValueError(f"{taught[0]}.distillation: name a teacher, teacher.model")
    if teacher.model is not None and all(section is None for section in sections.values()):
        raise ValueError(
            f"teacher.model: nobody learns from it; give {' or '.join(sections)} a distillation"
        )
    for stage, section in sections.items():
        reverse = isinstance(section, DistillationSettings) and section.divergence == "reverse_kl"
        if reverse and teacher.targets.kind != "top_k":
            raise ValueError(
                f"{stage}.distillation.divergence = reverse_kl compares probabilities, and sampled "
                "targets have none; take teacher.targets.kind = top_k"
            )
