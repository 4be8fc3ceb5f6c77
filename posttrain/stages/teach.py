"""A teacher's targets for a set of supervised rows, once: what `posttrain teach` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from posttrain.config import PolicySettings
from posttrain.data.chat import ChatFormat, sft_record
from posttrain.data.instructions import InstructionMix, InstructionSettings
from posttrain.data.sources import SourceSettings, load_sft_rows
from posttrain.inputs import locate_model, locate_teacher, teaching_of
from posttrain.stages.teaching import Teachers
from posttrain.teaching.records import TokenSequence
from posttrain.teaching.settings import TeacherSettings
from posttrain.types import SFTRow
from posttrain.workers.cluster import connect, disconnect
from posttrain.workers.settings import TeacherPoolSettings


class TeachResources(BaseModel):
    """See the section `resources` of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    teacher: TeacherPoolSettings = TeacherPoolSettings()
    deadline_s: float = Field(default=300.0, gt=0)


class TeachSettings(BaseModel):
    """The sections are those of a run, so that its SFT finds what is made here: the same rows, seen
    through the same tokenizer and template, with the policy as the critic."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: SourceSettings
    policy: PolicySettings
    system_instructions: list[InstructionSettings] = []
    teacher: TeacherSettings
    resources: TeachResources = TeachResources()


def teach(settings: TeachSettings) -> dict[str, Any]:
    """What the pass came to: `store`, and an `AcquireReport` each for `targets` and `critic`.

    Raises:
        ModelError: teacher or policy cannot be read, or their tokenizers differ.
        DataError: the rows cannot be read, or one is too long.
        StoreError: the store was made with something else.
    """
    assert settings.teacher.model is not None
    policy = locate_model(settings.policy.model)
    chat = ChatFormat(str(policy))
    teacher = locate_teacher(settings.teacher.model, chat, settings.policy.model)
    mix = InstructionMix(settings.system_instructions, seed=0)
    rows = load_sft_rows(settings.data)
    chat.check_rows(rows, mix, settings.policy.max_length)
    sequences = tokenised(rows, chat, mix)
    dtype = settings.resources.teacher.dtype
    teaching = teaching_of(teacher, policy, chat, settings.teacher, dtype, Path.cwd())
    teaching.check_store()
    teachers = Teachers(
        teaching=teaching,
        pool=settings.resources.teacher,
        deadline_s=settings.resources.deadline_s,
    )
    connect()
    try:
        reports = teachers.acquire(sequences, teaching.open_targets(), teaching.open_critic())
    finally:
        disconnect()
    return {"store": str(teaching.store)} | {k: asdict(report) for k, report in reports.items()}


def tokenised(rows: Sequence[SFTRow], chat: ChatFormat, mix: InstructionMix) -> list[TokenSequence]:
    """Each row as TRL's trainer prepares it: learnt is what follows the part that the prompt alone
    and the whole have in common."""
    sequences = []
    for row in rows:
        record = sft_record(row, mix.resolve(row.system))
        asked = chat.tokenizer.apply_chat_template(
            record["prompt"], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        whole = chat.tokenizer.apply_chat_template(
            [*record["prompt"], *record["completion"]], return_dict=True
        )["input_ids"]
        common = next(
            (i for i, pair in enumerate(zip(asked, whole, strict=False)) if pair[0] != pair[1]),
            min(len(asked), len(whole)),
        )
        sequences.append(
            TokenSequence(
                token_ids=np.array(whole, dtype=np.int64),
                label_mask=np.arange(len(whole)) >= max(common, 1),
            )
        )
    return sequences
