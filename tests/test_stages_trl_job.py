"""SFT and DPO under Ray Train and DeepSpeed against TRL by itself, on one rank and on two."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from learner_hosts import largest_difference
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from posttrain.data.chat import sft_record
from posttrain.errors import SettingsError, StageError
from posttrain.stages.trl_job import _prepare, keep_checkpoint, run_job
from posttrain.stages.trl_rank import RankJob
from posttrain.starter.tasks import starter_sft_rows
from posttrain.workers.settings import LearnerResources, LoraSettings

pytest_plugins = ["engine_fixtures"]
pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    # Ray Train makes settings of Ray Data, with all that is deprecated among them.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

STEPS, BATCH = 20, 8
LORA = LoraSettings(r=4, alpha=8)
TRAINER = {
    "max_length": 128,
    "max_steps": STEPS,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "gradient_checkpointing": False,
}
RANKS = {1: LearnerResources(cpus=0.5), 2: LearnerResources(cpus=0.5, ranks=2)}


ROWS = 8 * BATCH
"""Whole batches: where the last one is not, several ranks fill it up with rows from the front."""


def rows():
    return [sft_record(row, None) for row in starter_sft_rows(400, seed=0) if row.system is None]


def sft_records():
    return rows()[:ROWS]


def dpo_records():
    """The answer against its mirror image."""
    pairs = [
        {
            "prompt": row["prompt"],
            "chosen": [{"role": "assistant", "content": answer}],
            "rejected": [{"role": "assistant", "content": answer[::-1]}],
        }
        for row in rows()
        if (answer := row["completion"][0]["content"]) != answer[::-1]
    ]
    return pairs[:ROWS]


CASES = {
    "sft": ("sft", sft_records, {}, None),
    "packed": ("sft", sft_records, {"packing": True}, None),
    "sft-adapter": ("sft", sft_records, {}, LORA),
    "dpo": ("dpo", dpo_records, {"precompute_ref_log_probs": True, "beta": 0.1}, None),
    "rpo": (
        "dpo",
        dpo_records,
        {
            "precompute_ref_log_probs": True,
            "loss_type": ["sigmoid", "sft"],
            "loss_weights": [1.0, 0.5],
        },
        None,
    ),
}


def job_of(case, policy, directory, *, ranks=1, stage=2, **changes):
    kind, _, trainer, lora = CASES[case]
    per_rank = {"per_device_train_batch_size": BATCH // ranks}
    job = RankJob(
        kind=kind,
        model=str(policy),
        trainer=TRAINER | per_rank | trainer,
        deepspeed={"zero_optimization": {"stage": stage}},
        lora=lora,
        directory=str(directory),
        checkpoints=1,
        seed=0,
        threads=1,
        dtype="float32",
    )
    return replace(job, **changes)


def trained(job, case, ranks=1):
    told = []
    outcome = run_job(
        job,
        CASES[case][1](),
        resources=RANKS[ranks],
        deadline_s=120,
        on_record=told.append,
    )
    assert losses(told) == losses(outcome.history)[-len(losses(told)) :]
    return outcome


def losses(history):
    return [record["loss"] for record in history if "loss" in record]


@pytest.fixture(scope="module")
def plain(tiny_policy, tmp_path_factory):
    """The losses of TRL by itself, each case once."""
    known = {}

    def run(case):
        if case not in known:
            directory = tmp_path_factory.mktemp("plain")
            kind, records, trainer, lora = CASES[case]
            spec = {
                "kind": kind,
                "model": str(tiny_policy),
                "records": records(),
                "trainer": TRAINER | {"per_device_train_batch_size": BATCH} | trainer,
                "lora": None
                if lora is None
                else {
                    "task_type": "CAUSAL_LM",
                    "r": lora.r,
                    "lora_alpha": lora.alpha,
                    "target_modules": lora.target_modules,
                },
            }
            (directory / "spec").write_text(json.dumps(spec))
            script = Path(__file__).with_name("plain_trl.py")
            subprocess.run(
                [sys.executable, "-W", "ignore", script, directory / "spec"],
                check=True,
                capture_output=True,
                cwd=directory,
            )
            known[case] = losses(json.loads((directory / "history").read_text()))
        return known[case]

    return run


@pytest.fixture(scope="module")
def ours(cluster, tiny_policy, tmp_path_factory):
    """What our job came to, each case once."""
    known = {}

    def run(case, ranks, stage):
        if (case, ranks, stage) not in known:
            job = job_of(
                case, tiny_policy, tmp_path_factory.mktemp("ours"), ranks=ranks, stage=stage
            )
            known[case, ranks, stage] = trained(job, case, ranks)
        return known[case, ranks, stage]

    return run


@pytest.mark.parametrize(
    ("case", "ranks", "stage"),
    [
        ("sft", 1, 2),
        ("sft", 2, 2),
        ("sft", 2, 3),
        ("packed", 1, 2),
        ("sft-adapter", 2, 3),
        ("dpo", 1, 2),
        ("dpo", 2, 2),
        ("dpo", 2, 3),
        ("rpo", 1, 2),
    ],
)
def test_the_losses_are_those_of_plain_trl(ours, plain, case, ranks, stage):
    found = losses(ours(case, ranks, stage).history)
    assert len(found) == STEPS
    assert found == pytest.approx(plain(case), abs=1e-4)
    assert max(found) - min(found) > 0.01  # it is no constant that agrees


@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_comes_near_and_stays_bf16(cluster, tiny_policy, plain, tmp_path, stage):
    job = job_of("sft", tiny_policy, tmp_path, ranks=2, stage=stage, dtype="bfloat16")
    outcome = trained(job, "sft", ranks=2)
    assert losses(outcome.history) == pytest.approx(plain("sft"), abs=0.1)
    saved = load_file(outcome.policies[STEPS] / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


@pytest.mark.parametrize("case", ["sft", "dpo"])
def test_two_ranks_make_the_policy_that_one_makes(ours, tiny_policy, case):
    start, one, two, divided = (
        load_file(directory / "model.safetensors")
        for directory in (
            tiny_policy,
            *(ours(case, *how).policies[STEPS] for how in ((1, 2), (2, 2), (2, 3))),
        )
    )
    # AdamW moves weights with hardly any gradient by its sign, whatever rounding makes of it.
    assert largest_difference(one, start) > 1e-2
    assert largest_difference(one, two) < 1e-3
    assert largest_difference(one, divided) < 1e-3


def test_an_adapter_is_saved_in_pefts_format_and_merged(ours, tiny_policy):
    policy = ours("sft-adapter", 2, 3).policies[STEPS]
    base = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, str(policy.parent / "adapter")).merge_and_unload()
    ours_merged = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).state_dict()
    assert largest_difference(dict(merged.state_dict()), dict(ours_merged)) < 1e-6
    changed = {name for name in before if not torch.equal(before[name], ours_merged[name])}
    assert changed
    assert all(".self_attn." in name or ".mlp." in name for name in changed)


def test_policies_are_saved_on_the_way_and_one_is_kept(cluster, tiny_policy, tmp_path):
    job = job_of("sft", tiny_policy, tmp_path, checkpoints=3)
    policies = trained(job, "sft").policies
    assert list(policies) == [7, 14, 20]
    weights = {step: load_file(path / "model.safetensors") for step, path in policies.items()}
    assert largest_difference(weights[7], weights[20]) > 1e-3
    assert json.loads((policies[7] / "config.json").read_text()) == json.loads(
        (tiny_policy / "config.json").read_text()
    )
    keep_checkpoint(job, 14)
    kept = load_file(tmp_path / "policy" / "model.safetensors")
    assert largest_difference(kept, weights[14]) == 0
    assert not (tmp_path / "checkpoints").exists()
    # Killed from here on, the stage starts anew: a trainer that resumes at its last step, whose
    # own checkpoint `trainer.save_strategy` may have left, would save nothing.
    (tmp_path / "trainer" / "checkpoint-20").mkdir()
    _prepare(job, [])
    assert not (tmp_path / "trainer").exists()


def test_what_trl_refuses_is_said_in_its_words(cluster, tiny_policy, tmp_path):
    job = job_of("rpo", tiny_policy, tmp_path)
    wrong = replace(job, trainer=dict(job.trainer) | {"loss_type": ["sigmoid", "quadratic"]})
    with pytest.raises(StageError, match=r"^dpo, rank 0: ValueError: Unknown loss type: quadratic"):
        trained(wrong, "rpo")


def test_more_ranks_than_there_are_cores_are_refused_at_once(cluster, tiny_policy, tmp_path):
    resources = LearnerResources(cpus=1, ranks=999)
    with pytest.raises(SettingsError, match=r"999 actors of learner"):
        run_job(
            job_of("sft", tiny_policy, tmp_path),
            [],
            resources=resources,
            deadline_s=5,
            on_record=print,
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", ["sft", "dpo"])
def test_an_interrupted_job_goes_on_from_trls_own_checkpoint(cluster, tiny_policy, tmp_path, case):
    job = job_of(case, tiny_policy, tmp_path)
    job = replace(job, trainer=dict(job.trainer) | {"save_strategy": "steps", "save_steps": 10})
    expected = trained(job, case)
    last = load_file(expected.policies[STEPS] / "model.safetensors")
    # As if it had been killed after step 10.
    shutil.rmtree(tmp_path / "trainer" / "checkpoint-20")
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "trainer" / "outcome.json").unlink()
    made = sorted(path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir())
    found = trained(job, case)
    assert losses(found.history) == losses(expected.history)
    assert largest_difference(load_file(found.policies[STEPS] / "model.safetensors"), last) == 0
    # Tokens and reference log-probabilities were there.
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()) == made


def test_another_job_in_the_same_directory_starts_anew(cluster, tiny_policy, tmp_path):
    job = job_of("sft", tiny_policy, tmp_path, checkpoints=2)
    assert list(trained(job, "sft").policies) == [10, 20]
    shorter = replace(job, trainer=dict(job.trainer) | {"max_steps": 6})
    assert list(trained(shorter, "sft").policies) == [3, 6]
