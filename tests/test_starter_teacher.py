"""The starter's teacher knows the starter's tasks better, in the starter's own tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from posttrain.data.chat import ChatFormat
from posttrain.data.instructions import InstructionMix
from posttrain.inputs import STARTER_POLICY, STARTER_TEACHER_DIR
from posttrain.stages.teach import tokenised
from posttrain.starter.instructions import STEPS
from posttrain.starter.tasks import starter_sft_rows
from posttrain.starter.train import TEACHER, TrainSettings
from posttrain.workers.settings import TeacherPoolSettings
from posttrain.workers.teacher import CausalTeacher


def test_it_is_the_starter_trained_on_by_the_same_script():
    assert TEACHER.start is not None
    assert TEACHER.start.resolve() == STARTER_POLICY.resolve()
    shape = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "max_length")
    assert all(getattr(TEACHER, name) == getattr(TrainSettings(), name) for name in shape)
    size = (STARTER_TEACHER_DIR / "model.safetensors").stat().st_size
    assert size < 8e6


def test_it_gives_written_steps_more_probability_than_the_policy_does():
    """Per row of right steps, mean log-probability in nats; nearly every row is likelier to it."""
    policy, teacher = (str(path) for path in (STARTER_POLICY, STARTER_TEACHER_DIR))
    chat = ChatFormat(policy)
    assert ChatFormat(teacher).tokenizer.get_vocab() == chat.tokenizer.get_vocab()
    rows = [row for row in starter_sft_rows(400, seed=77) if row.system == STEPS.name]
    plain = [replace(row, system=None) for row in rows]
    asked = tokenised(plain, chat, InstructionMix([], seed=0))
    known = {}
    for who in (policy, teacher):
        model = CausalTeacher(who, TeacherPoolSettings(), rank=0, address="")
        known[who] = np.array([answer.mean() for answer in model.label_logprobs(asked, 1.0)])
    assert len(asked) > 30
    assert (known[teacher] > known[policy]).mean() > 0.9
    assert known[teacher].mean() == pytest.approx(-0.1, abs=0.1)
