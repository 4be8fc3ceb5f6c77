"""Distillation under Ray Train and DeepSpeed: one rank and two learn the same, and pay once."""

from __future__ import annotations

from pathlib import Path

import pytest
from learner_hosts import largest_difference
from safetensors.torch import load_file

from posttrain.data.chat import sft_record
from posttrain.losses.distillation_settings import DistillationSettings
from posttrain.stages.teaching import DistillationJob, Teachers
from posttrain.stages.trl_job import run_job
from posttrain.stages.trl_rank import RankJob
from posttrain.starter import POLICY_DIR
from posttrain.starter.tasks import starter_sft_rows
from posttrain.teaching.identity import Teaching
from posttrain.teaching.settings import TargetSettings
from posttrain.workers.settings import LearnerResources, TeacherPoolSettings

pytest_plugins = ["engine_fixtures"]
pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    # Ray Train makes settings of Ray Data, with all that is deprecated among them.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

STEPS, BATCH, HELD_OUT = 5, 8, 4


def records():
    """As many as fill every batch: else accelerate repeats some on several ranks."""
    rows = [row for row in starter_sft_rows(128, seed=0) if row.system is None]
    return [
        sft_record(row, None) | {"domain": row.prompt.domain}
        for row in rows[: STEPS * BATCH + HELD_OUT]
    ]


@pytest.fixture(scope="module")
def trained(cluster, tiny_policy, tmp_path_factory):
    """What a job came to; all of them share one store. The starter teaches the tiny policy."""
    store = tmp_path_factory.mktemp("store")

    def train(*, ranks: int, stage: int, packing: bool = False):
        teaching = Teaching(
            teacher=str(POLICY_DIR),
            teacher_fingerprint="t" * 64,
            critic=str(tiny_policy),
            critic_fingerprint="c" * 64,
            tokenizer="k",
            template="m",
            dtype="float32",
            targets=TargetSettings(),
            store=store,
        )
        job = RankJob(
            kind="sft",
            model=str(tiny_policy),
            trainer={
                "max_length": 128,
                "max_steps": STEPS,
                "logging_steps": 1,
                "learning_rate": 1e-3,
                "gradient_checkpointing": False,
                "per_device_train_batch_size": BATCH // ranks,
                "packing": packing,
            },
            deepspeed={"zero_optimization": {"stage": stage}},
            lora=None,
            directory=str(tmp_path_factory.mktemp("job")),
            checkpoints=1,
            seed=0,
            threads=1,
            dtype="float32",
            distillation=DistillationJob(
                settings=DistillationSettings(held_out=HELD_OUT, every_steps=2),
                teachers=Teachers(
                    teaching=teaching, pool=TeacherPoolSettings(cpus=0.2), deadline_s=120.0
                ),
            ),
        )
        return run_job(
            job,
            records(),
            resources=LearnerResources(cpus=0.5, ranks=ranks),
            deadline_s=120,
            on_record=lambda record: None,
        )

    return train


def weights(outcome) -> dict[str, object]:
    path: Path = outcome.policies[STEPS]
    return dict(load_file(path / "model.safetensors"))


def test_two_ranks_learn_what_one_learns_and_pay_no_teacher_again(trained, tiny_policy):
    one = trained(ranks=1, stage=2)
    assert one.metrics["teacher"]["targets"]["hits"] == 0
    divided = trained(ranks=2, stage=3)
    assert divided.metrics["teacher"]["targets"]["hit_rate"] == 1.0
    found, wanted = (
        [record["loss"] for record in outcome.history if "loss" in record]
        for outcome in (divided, one)
    )
    assert len(found) == STEPS
    assert found == pytest.approx(wanted, abs=1e-4)
    gaps = [
        [record["distill/gap"] for record in outcome.history if "distill/gap" in record]
        for outcome in (divided, one)
    ]
    assert len(gaps[0]) == 3
    assert gaps[0] == pytest.approx(gaps[1], abs=1e-4)
    start = load_file(tiny_policy / "model.safetensors")
    assert largest_difference(weights(one), start) > 1e-3
    assert largest_difference(weights(one), weights(divided)) < 1e-3


def test_packed_rows_are_taught_too(trained):
    outcome = trained(ranks=1, stage=2, packing=True)
    losses = [record["loss"] for record in outcome.history if "loss" in record]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
