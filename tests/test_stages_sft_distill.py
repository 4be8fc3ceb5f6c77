"""TRL's trainer with a teacher: the same loss as by hand, however rows are batched and packed."""

from __future__ import annotations

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from posttrain.data.chat import ChatFormat, sft_record
from posttrain.data.instructions import InstructionMix
from posttrain.errors import SettingsError, StageError
from posttrain.losses.distillation_settings import DistillationSettings
from posttrain.stages.sft_distill import DistillingTrainer, split_rows
from posttrain.stages.teach import tokenised
from posttrain.stages.teaching import DistillationJob, Teachers
from posttrain.starter.tasks import starter_sft_rows
from posttrain.teaching.identity import Teaching
from posttrain.teaching.records import TokenSequence
from posttrain.teaching.settings import TargetSettings
from posttrain.workers.settings import TeacherPoolSettings
from posttrain.workers.teacher import CausalTeacher

ROWS = [row for row in starter_sft_rows(64, seed=3) if row.system is None]


LOADED: list[str] = []
"""Models, in order, since the last `made`."""


class LocalTeachers(Teachers):
    """Asks in this process; notes which models were loaded."""

    @contextmanager
    def _models(self):
        def load(model):
            LOADED.append(model)
            return CausalTeacher(model, self.pool, rank=0, address="127.0.0.1:1")

        yield load


@pytest.fixture(scope="module")
def teacher_dir(tiny_policy, tmp_path_factory):
    """The tiny policy, shaken: another model with the same tokenizer."""
    directory = tmp_path_factory.mktemp("tiny-teacher")
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype="float32")
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_policy).save_pretrained(directory)
    return directory


@pytest.fixture
def made(tiny_policy, teacher_dir, tmp_path):
    """Makes a trainer, on the given settings."""

    def make(weighing=None, targets=None, trainer=None, rows=None, store=None):
        weighing = {"weight": "constant"} if weighing is None else weighing
        teaching = Teaching(
            teacher=str(teacher_dir),
            teacher_fingerprint="t" * 64,
            critic=str(tiny_policy),
            critic_fingerprint="c" * 64,
            tokenizer="k",
            template="m",
            dtype="float32",
            targets=TargetSettings(**(targets or {})),
            store=store or tmp_path / "store",
        )
        teachers = LocalTeachers(teaching=teaching, pool=TeacherPoolSettings(), deadline_s=1.0)
        settings = DistillationSettings(**weighing)
        records = [sft_record(row, None) | {"domain": row.prompt.domain} for row in rows or ROWS]
        arguments = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 8,
            "max_length": 64,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
        }
        return DistillingTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_policy, dtype="float32"),
            args=SFTConfig(**arguments | (trainer or {})),
            train_dataset=Dataset.from_list(records),
            processing_class=AutoTokenizer.from_pretrained(tiny_policy),
            distillation=DistillationJob(
                settings=settings, teachers=None if settings.weight == "ce_only" else teachers
            ),
        )

    LOADED.clear()
    return make


def batch_of(trainer, size):
    """The collated first rows."""
    return trainer.data_collator([trainer.train_dataset[i] for i in range(size)])


def loss_by_hand(model, teacher_dir, sequences, alpha, temperature=1.0):
    """One sequence at a time, with the teacher's whole distribution."""
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype="float32").eval()
    total, count = 0.0, 0
    for sequence in sequences:
        ids = torch.tensor(sequence.token_ids)[None]
        learnt = torch.tensor(sequence.label_mask[1:])
        p = model(input_ids=ids, use_cache=False).logits[0, :-1][learnt]
        with torch.no_grad():
            q = teacher(input_ids=ids, use_cache=False).logits[0, :-1][learnt]
        ce = torch.nn.functional.cross_entropy(p, ids[0, 1:][learnt], reduction="none")
        soft_p, soft_q = ((x / temperature).log_softmax(-1) for x in (p, q))
        kl = (soft_q.exp() * (soft_q - soft_p)).sum(-1)
        total = total + ((1 - alpha) * ce + alpha * temperature**2 * kl).sum()
        count += int(learnt.sum())
    return total / count


WHOLE = {"kind": "top_k", "k": 200}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_is_that_by_hand_packed_or_not(made, teacher_dir, packed, temperature):
    how = {"packing": True, "max_length": 96} if packed else {}
    trainer = made({"weight": "constant", "alpha": 0.3}, WHOLE | {"temperature": temperature}, how)
    trainer.model.train()
    inputs = batch_of(trainer, 3 if packed else 8)
    sequences = [s for s in split_rows(inputs) if s.num_labels]
    assert len(sequences) >= (4 if packed else 8)
    if packed:
        assert inputs["input_ids"].shape[0] == 1
    wanted = loss_by_hand(trainer.model, teacher_dir, sequences, 0.3, temperature)
    parameters = list(trainer.model.parameters())
    expected = torch.autograd.grad(wanted, parameters)
    loss = trainer.compute_loss(trainer.model, inputs)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_the_denominator_is_that_of_the_whole_batch(made):
    trainer = made(targets=WHOLE)
    trainer.model.train()
    inputs = batch_of(trainer, 8)
    count = int((inputs["labels"][:, 1:] != -100).sum())
    whole = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=count)
    halves = []
    for rows in (slice(0, 3), slice(3, 8)):
        part = {name: tensor[rows] for name, tensor in inputs.items()}
        halves.append(trainer.compute_loss(trainer.model, part, num_items_in_batch=count))
    torch.testing.assert_close(sum(halves), whole)


def test_without_a_teacher_it_is_trls_own_loss(made):
    trainer = made({"weight": "ce_only"})
    trainer.model.train()
    inputs = batch_of(trainer, 8)
    ours = trainer.compute_loss(trainer.model, dict(inputs))
    labels = inputs["labels"]
    logits = trainer.model(input_ids=inputs["input_ids"], use_cache=False).logits
    wanted = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    torch.testing.assert_close(ours, wanted)
    assert LOADED == []


def test_a_second_trainer_loads_no_teacher(made, teacher_dir, tiny_policy):
    first = made({}).teaching_report
    assert [str(teacher_dir), str(tiny_policy)] == LOADED
    assert first["targets"]["hits"] == first["critic"]["hits"] == 0
    LOADED.clear()
    second = made({}).teaching_report
    assert LOADED == []
    for who in ("targets", "critic"):
        assert second[who]["hit_rate"] == 1.0
        assert second[who]["seconds_saved"] > 0
    # A random teacher spreads its draws over some forty of the hundred ids, two bytes each.
    assert 80 > second["targets"]["bytes_per_label"] > 40


def test_what_teach_stores_is_what_the_trainer_asks_for(made, tiny_policy):
    """Keys are of the final ids: TRL's preparation and ours must agree to the last one."""
    chat = ChatFormat(str(tiny_policy))
    taught = tokenised(ROWS, chat, InstructionMix([], seed=0))
    trainer = made(trainer={"max_length": 192})
    prepared = [
        TokenSequence.of_labels(row["input_ids"], row["labels"]) for row in trainer.train_dataset
    ]
    assert sorted(s.key for s in taught) == sorted(s.key for s in prepared)


def test_truncated_rows_have_targets_of_their_own(made):
    trainer = made({"weight": "constant"}, trainer={"max_length": 20})
    longest = max(len(row["input_ids"]) for row in trainer.train_dataset)
    assert longest == 20
    trainer.model.train()
    assert trainer.compute_loss(trainer.model, batch_of(trainer, 8)).isfinite()


def test_training_lowers_the_loss_and_tells_how_the_teacher_is_weighed(made):
    trainer = made({"held_out": 4, "every_steps": 2}, trainer={"max_steps": 12})
    outcome = trainer.train()
    history = [record for record in trainer.state.log_history if "loss" in record]
    assert len(history) == 12
    measured = [r["distill/held_out/student_ce"] for r in history[::2]]
    assert measured == sorted(measured, reverse=True)
    assert outcome.global_step == 12
    last = history[-2]  # λ was measured before this step
    for name in ("alpha", "responsibility", "ce", "divergence", "lambda", "gap"):
        assert np.isfinite(last[f"distill/{name}"]), name
    assert 0.1 <= last["distill/lambda"] <= 1
    assert last["distill/alpha/q0.1"] <= last["distill/alpha/q0.5"] <= last["distill/alpha/q0.9"]
    assert last["distill/alpha"] <= last["distill/lambda"] + 1e-6
    domains = {row.prompt.domain for row in ROWS}
    told = {n.rpartition("/")[2] for n in last if n.startswith("distill/prior/")}
    assert told and told <= domains
    assert "distill/lambda" not in history[-1]


def test_held_out_rows_are_not_trained_on(made):
    trainer = made({"held_out": 4})
    trained = {
        TokenSequence.of_labels(r["input_ids"], r["labels"]).key for r in trainer.train_dataset
    }
    held_out = [row.sequence.key for row in trainer._held_out]
    assert len(held_out) == min(4, int(0.1 * len(ROWS)))
    assert not trained & set(held_out)
    assert len(trainer.train_dataset) + len(held_out) == len(ROWS)


@torch.no_grad()
def label_logprobs(path, sequences):
    """[N]"""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    found = []
    for sequence in sequences:
        ids = torch.as_tensor(sequence.token_ids)
        logprobs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        labels = torch.as_tensor(sequence.label_mask)[1:]
        found.append(logprobs.gather(-1, ids[1:, None])[:, 0][labels])
    return torch.cat(found)


def test_the_gap_is_measured_over_labels_that_the_teacher_is_responsible_for(
    made, tiny_policy, teacher_dir
):
    trainer = made({"held_out": 3, "margin": 0.5})
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch_of(trainer, 4))
    sequences = [row.sequence for row in trainer._held_out]
    student, teacher = (label_logprobs(path, sequences) for path in (tiny_policy, teacher_dir))
    # Before the first step the student is the critic.
    weight = torch.sigmoid(math.log(9) + teacher - student + 0.5)
    assert weight.max() - weight.min() > 0.1
    gap = (weight * (teacher - student)).sum() / weight.sum()
    assert gap.item() != pytest.approx((teacher - student).mean().item(), abs=1e-3)
    assert trainer._metrics["train"]["distill/gap"] == [pytest.approx(gap.item(), abs=1e-4)]
    assert trainer.model.training


def test_evaluation_stays_cross_entropy(made):
    trainer = made({"weight": "constant", "alpha": 1.0})
    trainer.model.eval()
    inputs = batch_of(trainer, 8)
    with torch.no_grad():
        ours = trainer.compute_loss(trainer.model, dict(inputs))
        logits = trainer.model(input_ids=inputs["input_ids"], use_cache=False).logits
    labels = inputs["labels"][:, 1:].flatten()
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels)
    torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("strategy", ["wrapped", "bfd_split"])
def test_packing_that_cuts_rows_apart_is_refused(made, strategy):
    with pytest.raises(SettingsError, match=strategy):
        made(trainer={"packing": True, "packing_strategy": strategy})


def test_too_few_rows_to_hold_any_out_are_refused(made):
    with pytest.raises(SettingsError, match="only 1"):
        made({}, rows=ROWS[:1])


def test_reverse_kl_is_trained_too(made):
    trainer = made({"weight": "constant", "divergence": "reverse_kl"}, {"kind": "top_k", "k": 8})
    trainer.train()
    assert all(np.isfinite(r["loss"]) for r in trainer.state.log_history if "loss" in r)


def test_training_goes_on_with_the_weights_that_it_had(made, tmp_path):
    weighing = {"weight": "dynamic", "every_steps": 1, "held_out": 8}
    how = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "seed": 3}
    whole = made(weighing, trainer=how)
    whole.train()
    rest = made(weighing, trainer=how)
    rest.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert rest._lead.gap == pytest.approx(whole._lead.gap, abs=1e-6)
    assert rest._reliability.by_domain == pytest.approx(whole._reliability.by_domain, abs=1e-6)
    losses = [
        [r["loss"] for r in trainer.state.log_history if "loss" in r] for trainer in (whole, rest)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_checkpoint_without_weights_is_refused(made, tmp_path):
    weighing = {"weight": "dynamic", "every_steps": 1, "held_out": 8}
    how = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    made(weighing, trainer=how).train()
    (tmp_path / "out" / "checkpoint-1" / "teacher_weight.json").unlink()
    with pytest.raises(StageError, match=r"checkpoint-1, which does not say how the teacher was"):
        made(weighing, trainer=how).train(
            resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1")
        )
