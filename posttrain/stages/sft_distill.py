"""TRL's SFT trainer with a second target for each token: what a teacher would have said.

TRL's own loss fuses the head into the model and yields no logits, and what reaches it of a row are
ids and labels. So rows are split again where they were packed, and targets are found by the hash of
the final ids: those of the data set as the trainer prepared it, truncation included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from trl import SFTTrainer

from posttrain.errors import SettingsError
from posttrain.losses.distillation import (
    TeacherTargets,
    distillation_losses,
    mixed_loss,
    responsibility,
)
from posttrain.losses.distillation_settings import DistillationSettings
from posttrain.losses.teacher_weight import Lead, Reliability, dynamic_weight
from posttrain.stages.teaching import DistillationJob, Teachers
from posttrain.stages.weight_state import WeightState
from posttrain.teaching.acquire import wait_for
from posttrain.teaching.records import Record, TokenSequence, padded_targets
from posttrain.teaching.store import TargetStore

if TYPE_CHECKING:
    from posttrain.types import FloatArray

CHUNK_TOKENS = 4096
"""Of a micro-batch, whose log-probabilities exist at once beside the model's own logits."""
HELD_OUT_SHARE = 0.1
"""Of a small data set, at most so much is held out."""
QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class _Row:
    """A prepared row and what it is about."""

    sequence: TokenSequence
    domain: str


class DistillingTrainer(SFTTrainer):  # type: ignore[misc]
    """`SFTTrainer`, its training loss replaced; evaluation stays cross-entropy.

    Records carry a column `domain`. `teaching_report` says what targets cost and saved. Without
    teachers it is `SFTTrainer`.

    Raises:
        SettingsError: packing would cut rows into others than were prepared.
        StoreError: the store's targets were made with something else.
    """

    def __init__(self, *arguments: Any, distillation: DistillationJob, **keywords: Any) -> None:
        self._job = distillation
        self._rows: list[_Row] = []
        self._held_out: list[_Row] = []
        super().__init__(*arguments, **keywords)
        settings = distillation.settings
        self.teaching_report: dict[str, Any] = {}
        self._domain_of = {row.sequence.key: row.domain for row in self._rows}
        self._domains = sorted({row.domain for row in self._rows})
        self._measured_at: int | None = None
        self._lead: Lead | None = None
        self._reliability: Reliability | None = None
        if settings.weight == "dynamic":
            self._lead, self._reliability = dynamic_weight(settings)
            self.add_callback(WeightState(self._lead, self._reliability))
        self._targets: TargetStore | None = None
        self._critic: TargetStore | None = None
        if distillation.teachers is not None:
            rows = [*self._rows, *self._held_out]
            self._acquire(distillation.teachers, [row.sequence for row in rows])

    def _acquire(self, teachers: Teachers, sequences: Sequence[TokenSequence]) -> None:
        """Only the first rank asks; the others see in the store when it has what they need."""
        self._targets = teachers.teaching.open_targets()
        if self._reliability is not None:
            self._critic = teachers.teaching.open_critic()
        if self.accelerator.is_main_process:
            reports = teachers.acquire(sequences, self._targets, self._critic)
            self.teaching_report = {name: asdict(report) for name, report in reports.items()}
        for store in (self._targets, self._critic):
            if store is not None:
                wait_for(sequences, store)

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        """Prepares rows first, while each still knows its domain, and packs them afterwards."""
        prepare = super()._prepare_dataset
        if dataset_name != "train" or self._job.teachers is None:
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
        if packing and args.packing_strategy != "bfd":
            raise SettingsError(
                f"sft.trainer.packing_strategy = {args.packing_strategy} cuts rows apart, and then "
                "no teacher has seen them: take bfd"
            )
        prepared = prepare(dataset, processing_class, args, False, formatting_func, dataset_name)
        rows = [
            _Row(TokenSequence.of_labels(r["input_ids"], r["labels"]), str(r["domain"]))
            for r in prepared
        ]
        kept, held_out = _split(rows, self._job.settings)
        self._rows = [rows[i] for i in kept]
        self._held_out = [rows[i] for i in held_out]
        prepared = prepared.select(kept).select_columns(["input_ids", "labels"])
        if packing:
            return prepare(prepared, processing_class, args, True, None, dataset_name)
        return prepared

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """See `posttrain.losses.distillation`. The denominator is that of all micro-batches and
        ranks, as TRL counts it."""
        if not self.model.training or self._job.teachers is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._measure_lead(model)
        sequences = [s for s in split_rows(inputs) if s.num_labels]
        labels = inputs["labels"][:, 1:]
        trained = labels != -100
        outputs = model(
            **{name: value for name, value in inputs.items() if name != "labels"},
            use_cache=False,
            **({"output_router_logits": True} if self.aux_loss_enabled else {}),
        )
        targets = self._targets_of(sequences, labels.device)
        temperature = self._job.teachers.teaching.targets.temperature
        losses = distillation_losses(
            outputs.logits[:, :-1][trained],
            labels[trained],
            targets,
            temperature=temperature,
            divergence=self._job.settings.divergence,
            chunk_tokens=CHUNK_TOKENS,
        )
        alpha = self._weigh(sequences, targets)
        count = trained.sum() if num_items_in_batch is None else num_items_in_batch
        loss = mixed_loss(
            losses,
            alpha,
            temperature=temperature,
            num_loss_tokens=torch.as_tensor(count).clamp(min=1),
        )
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled:
            auxiliary = self.router_aux_loss_coef * outputs.aux_loss
            if num_items_in_batch is not None:
                auxiliary = auxiliary / self.current_gradient_accumulation_steps
            loss = loss + auxiliary
        self._note("ce", losses.ce)
        self._note("divergence", losses.divergence)
        return loss

    def _weigh(self, sequences: Sequence[TokenSequence], targets: TeacherTargets) -> Tensor:
        """α of each loss token, `[N]`; what it rests on is recorded, and learnt from."""
        known = targets.label_logprobs
        if self._reliability is None:
            alpha = torch.full_like(known, float(self._job.settings.alpha or 0))
        else:
            assert self._critic is not None
            assert self._lead is not None
            numbers = self._domain_numbers(sequences, known.device)
            priors = [self._reliability.prior(domain) for domain in self._domains]
            records = [self._critic.read(s.key).per_label["label_logprobs"] for s in sequences]
            critic = torch.as_tensor(np.concatenate(records or [np.zeros(0)])).to(known)
            weight = self._responsibility(known, critic, torch.tensor(priors).to(known)[numbers])
            alpha = self._lead.weight * weight
            self._learn_reliability(numbers, weight)
            self._note_by_domain("alpha", numbers, alpha)
            self._note("responsibility", weight)
        self._note("alpha", alpha)
        # More than half of the teacher's mass on the label: nothing else is likelier to it.
        agrees = known > np.log(0.5)
        self._note("alpha/teacher_agrees", alpha[agrees])
        self._note("alpha/teacher_disagrees", alpha[~agrees])
        if len(alpha):
            for quantile in QUANTILES:
                value = alpha.float().quantile(quantile).item()
                self._metrics["train"][f"distill/alpha/q{quantile:g}"].append(value)
        return alpha

    def _responsibility(self, known: Tensor, critic: Tensor, prior: Tensor) -> Tensor:
        assert self._job.settings.margin is not None
        return responsibility(known, critic, prior, self._job.settings.margin)

    def _domain_numbers(self, sequences: Sequence[TokenSequence], device: Any) -> Tensor:
        numbers = [self._domains.index(self._domain_of[s.key]) for s in sequences]
        lengths = [s.num_labels for s in sequences]
        return torch.tensor(np.repeat(numbers, lengths), dtype=torch.int64, device=device)

    def _learn_reliability(self, numbers: Tensor, weight: Tensor) -> None:
        """From the tokens of all ranks, so that all of them go on with the same priors."""
        assert self._reliability is not None
        sums = torch.zeros(2, len(self._domains), device=weight.device)
        sums[0].index_add_(0, numbers, weight.float())
        sums[1].index_add_(0, numbers, torch.ones_like(weight, dtype=torch.float32))
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        for domain, of_domain, tokens in zip(self._domains, total, count, strict=True):
            if tokens:
                self._reliability.observe(domain, of_domain / tokens)
                prior = self._reliability.prior(domain)
                self._metrics["train"][f"distill/prior/{domain}"].append(prior)

    def _measure_lead(self, model: Any) -> None:
        """Before a step that is due: cross-entropies of student and teacher on held-out rows, over
        the labels that the teacher can stand for."""
        step = self.state.global_step
        due = step % self._job.settings.every_steps == 0 and step != self._measured_at
        if self._lead is None or not due:
            return
        self._measured_at = step
        sequences = [row.sequence for row in self._held_out]
        teacher, weight = self._trusted_labels()
        student = _label_logprobs(model, sequences, self.args.per_device_train_batch_size)
        student_ce = -float(np.average(student, weights=weight))
        teacher_ce = -float(np.average(teacher, weights=weight))
        self._lead.observe(student_ce, teacher_ce)
        measured = {
            "gap": self._lead.gap,
            "lambda": self._lead.weight,
            "held_out/student_ce": student_ce,
            "held_out/teacher_ce": teacher_ce,
        }
        for name, value in measured.items():
            self._metrics["train"][f"distill/{name}"].append(value)

    def _trusted_labels(self) -> tuple[FloatArray, FloatArray]:
        """log q of the held-out labels, and the teacher's responsibility for each, both `[N]`;
        responsibilities are positive, so that they can weigh a mean."""
        assert self._targets is not None
        assert self._critic is not None
        assert self._reliability is not None
        heard, weights = [], []
        for row in self._held_out:
            teacher, critic = (
                torch.as_tensor(store.read(row.sequence.key).per_label["label_logprobs"])
                for store in (self._targets, self._critic)
            )
            prior = torch.tensor(self._reliability.prior(row.domain))
            heard.append(teacher.numpy())
            weights.append(self._responsibility(teacher, critic, prior).numpy())
        return np.concatenate(heard), np.concatenate(weights) + np.finfo(np.float32).tiny

    def _targets_of(self, sequences: Sequence[TokenSequence], device: Any) -> TeacherTargets:
        assert self._targets is not None
        assert self._job.teachers is not None
        records = [self._targets.read(s.key) for s in sequences]
        return teacher_targets(records, self._job.teachers.teaching.targets.samples, device)

    def _note(self, name: str, values: Tensor) -> None:
        if len(values):
            self._metrics["train"][f"distill/{name}"].append(values.detach().float().mean().item())

    def _note_by_domain(self, name: str, numbers: Tensor, values: Tensor) -> None:
        for number, domain in enumerate(self._domains):
            self._note(f"{name}/{domain}", values[numbers == number])


def teacher_targets(records: Sequence[Record], samples: int | None, device: Any) -> TeacherTargets:
    """Stored records as the loss wants them, `N` loss tokens in their order."""
    if not records:
        nothing = torch.zeros(0, device=device)
        ids = torch.zeros(0, 1, dtype=torch.int64, device=device)
        tail = nothing if samples is None else None
        return TeacherTargets(ids, nothing[:, None], tail, nothing, nothing)
    arrays = {
        name: torch.as_tensor(array).to(device)
        for name, array in padded_targets(records, samples).items()
    }
    return TeacherTargets(
        arrays["ids"],
        arrays["weights"],
        arrays.get("tail"),
        arrays["entropy"],
        arrays["label_logprobs"],
    )


def split_rows(inputs: Mapping[str, Tensor]) -> Iterator[TokenSequence]:
    """The rows that a collated batch was made of, in order: padding is taken off, and what was
    packed is split where positions start anew."""
    ids, labels = inputs["input_ids"].cpu().numpy(), inputs["labels"].cpu().numpy()
    if "attention_mask" in inputs:
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        for row, length in enumerate(lengths):
            yield TokenSequence.of_labels(ids[row, :length], labels[row, :length])
        return
    starts = np.flatnonzero(inputs["position_ids"][0].cpu().numpy() == 0).tolist()
    for start, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
        yield TokenSequence.of_labels(ids[0, start:end], labels[0, start:end])


def _split(rows: Sequence[_Row], settings: DistillationSettings) -> tuple[list[int], list[int]]:
    """Numbers of the rows that are trained on, and of those that λ is measured on: the smallest
    keys, so that the choice depends on the rows alone."""
    if settings.weight != "dynamic":
        return list(range(len(rows))), []
    count = min(settings.held_out, max(1, int(HELD_OUT_SHARE * len(rows))))
    if len(rows) <= count:
        raise SettingsError(
            f"sft.distillation.weight = dynamic holds rows out, and there are only {len(rows)}: "
            "give more, or take weight = constant"
        )
    by_key = sorted(range(len(rows)), key=lambda i: rows[i].sequence.key)
    held_out = set(by_key[:count])
    return [i for i in range(len(rows)) if i not in held_out], sorted(held_out)


@torch.no_grad()
def _label_logprobs(model: Any, sequences: Sequence[TokenSequence], batch_size: int) -> FloatArray:
    """Of all labels in order, `[N]`, nats. All ranks compute all: under ZeRO-3 they meet inside."""
    found = []
    with _evaluating(model):
        for start in range(0, len(sequences), batch_size):
            part = sequences[start : start + batch_size]
            length = max(len(s.token_ids) for s in part)
            ids = torch.zeros(len(part), length, dtype=torch.int64, device=model.device)
            mask = torch.zeros(len(part), length, dtype=torch.bool, device=model.device)
            for row, sequence in enumerate(part):
                ids[row, : len(sequence.token_ids)] = torch.as_tensor(sequence.token_ids)
                mask[row, : len(sequence.label_mask)] = torch.as_tensor(sequence.label_mask)
            # Padding on the right, where causal attention never looks.
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1][mask[:, 1:]]
            losses = torch.nn.functional.cross_entropy(
                logits.float(), ids[:, 1:][mask[:, 1:]], reduction="none"
            )
            found.append(-losses.cpu().numpy())
    return np.concatenate(found)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()
