"""One rank of the learner: its share of the policy's training weights on a DeepSpeed engine.

A plain class. All ranks call the same methods in the same order, each with its own share of a
batch, and meet inside. It runs in a process of its own, never in an engine's process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from posttrain.errors import DivergenceError
from posttrain.losses.aggregate import Denominators
from posttrain.losses.diagnostics import summarise
from posttrain.types import MicroBatch, PolicyVersion, TrainingBatch
from posttrain.workers import checkpoints, policy_export
from posttrain.workers.experts import fetch_experts_as_one, refuse_expert_parallel
from posttrain.workers.learner_config import backend, prepare_process, training_config
from posttrain.workers.packing_check import check_noise, check_packing
from posttrain.workers.policy_loss import micro_batch_loss
from posttrain.workers.policy_model import (
    PackedPolicy,
    add_adapter,
    can_share_prompts,
    load_model,
    model_fingerprint,
)
from posttrain.workers.reference import (
    Reference,
    adapter_reference,
    batch_scorer,
    frozen_reference,
)
from posttrain.workers.schedule import learning_rate
from posttrain.workers.settings import LearnerSettings, LoraSettings


class DeepSpeedLearner:
    """Owns this rank's part of the policy's weights and optimizer state during online RL.

    Args:
        model_path: a checkpoint directory or hub name that transformers loads; the policy that
            enters the stage, also when a checkpoint is restored afterwards.
        temperature: the sampling temperature of the rollouts; the loss's log-probabilities use it.
        max_age: the lag bound; diagnostics are kept by age up to it.
        max_tokens: the limit of a completion, which Dr.GRPO divides by.
        num_steps: the stage's optimizer steps, for the learning-rate schedule.
        lora: train an adapter and leave the policy as it is, so that the loss's reference needs no
            memory of its own.
        address: host:port at which the ranks meet.
        checkpoint: what `save_checkpoint` wrote, to go on from there.

    Raises:
        ModelError: the model cannot be loaded, its sequences cannot be packed, it is noisy in
            training, or `checkpoint` was made from another one.
        SettingsError: an adapter cannot be put where it should be.
        RunDirError: `checkpoint` is not whole, or was made by other ranks or another ZeRO stage.
    """

    def __init__(
        self,
        model_path: str,
        settings: LearnerSettings,
        *,
        temperature: float,
        max_age: int,
        max_tokens: int,
        num_steps: int,
        seed: int,
        rank: int,
        num_ranks: int,
        address: str,
        lora: LoraSettings | None = None,
        checkpoint: str | None = None,
    ) -> None:
        prepare_process(settings, rank=rank, num_ranks=num_ranks, address=address, seed=seed)
        import deepspeed

        deepspeed.init_distributed(
            dist_backend=backend(),
            verbose=False,
            timeout=timedelta(seconds=settings.step_deadline_s),
        )
        self._settings = settings
        self._temperature = temperature
        self._max_age = max_age
        self._max_tokens = max_tokens
        self._num_steps = num_steps
        self._num_ranks = num_ranks
        self._steps = 0
        self._skipped = 0
        self._model = load_model(model_path, settings)
        self._layout = checkpoints.Layout.of(
            settings, lora, fingerprint=model_fingerprint(self._model), ranks=num_ranks
        )
        if checkpoint is not None:
            checkpoints.check(Path(checkpoint), self._layout)
        self._adapted = add_adapter(self._model, lora) if lora else None
        if settings.expert_parallel > 1:
            refuse_expert_parallel(self._model.config, settings.expert_parallel, num_ranks)
        elif settings.zero_stage == 3:
            fetch_experts_as_one(self._model)
        self._engine, _, _, _ = deepspeed.initialize(
            model=PackedPolicy(self._model, settings.logprob_chunk_tokens),
            model_parameters=[p for p in self._model.parameters() if p.requires_grad],
            config=training_config(settings, self._model.config.model_type),
        )
        self._check_architecture(model_path)
        self._reference = self._load_reference(model_path)
        torch.manual_seed(seed + rank)  # what an adapter's dropout hides differs between ranks
        if checkpoint is not None:
            counters = checkpoints.restore(self._engine, Path(checkpoint))
            self._steps, self._skipped = counters.steps, counters.skipped

    def _check_architecture(self, model_path: str) -> None:
        """Raises ModelError for one that cannot be packed, or is noisy in training."""
        score = batch_scorer(self._engine, self._temperature)

        def score_in(batch: MicroBatch, *, training: bool) -> Tensor:
            self._engine.train(training)
            return score(self._tensors(batch)).cpu()

        facts: dict[str, Any] = {
            "vocab_size": self._model.get_input_embeddings().num_embeddings,
            "dtype": self._settings.dtype,
        }
        in_evaluation = partial(score_in, training=False)
        in_training = partial(score_in, training=True)
        check_packing(model_path, in_evaluation, share_prompts=self.can_share_prompts(), **facts)
        check_noise(model_path, in_evaluation, in_training, **facts)
        self._engine.eval()

    def _load_reference(self, model_path: str) -> Reference | None:
        if not self._settings.loss.kl_coefficient:
            return None
        if self._adapted is not None:
            return adapter_reference(self._engine, self._adapted, self._temperature)
        model = load_model(model_path, self._settings)
        return frozen_reference(model, self._settings, self._temperature)

    def step(self, share: TrainingBatch) -> dict[str, float]:
        """One optimizer step over the micro-batches of all ranks; every rank returns the same.

        Raises:
            DivergenceError: `max_skipped_steps` steps in a row had a non-finite loss or gradient.
        """
        began = time.perf_counter()
        rate = self._set_learning_rate()
        loss, sums = self._backward(share)
        self._engine.step()
        for total in (loss, *sums.values()):
            dist.all_reduce(total)
        grad_norm = float(self._engine.get_global_grad_norm())
        self._steps += 1
        self._count_skipped(loss.item(), grad_norm)
        return {
            "loss": loss.item(),
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "skipped_steps": float(self._skipped),
            "step_s": time.perf_counter() - began,
        } | summarise(sums)

    def _backward(self, share: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients of all ranks' micro-batches; this rank's loss and `diagnostic_sums`."""
        self._engine.train()
        over = Denominators(share.num_loss_tokens, share.num_sequences, self._max_tokens)
        batches = [self._tensors(micro_batch) for micro_batch in share.micro_batches]
        references = [self._reference(batch) if self._reference else None for batch in batches]
        loss = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        sums: dict[str, Tensor] = {}
        for index, (batch, ref_logprobs) in enumerate(zip(batches, references, strict=True)):
            self._engine.set_gradient_accumulation_boundary(is_boundary=index == len(batches) - 1)
            logprobs, entropy = self._engine(
                batch["token_ids"],
                batch["position_ids"],
                self._temperature,
                batch["sequence_ids"],
            )
            part, micro_sums = micro_batch_loss(
                logprobs,
                entropy,
                batch,
                over,
                self._settings.loss,
                ref_logprobs,
                self._max_age,
                share.teacher_weight,
            )
            # DeepSpeed averages gradients over ranks; the parts are to be added up.
            self._engine.backward(part * self._num_ranks)
            loss += part.detach()
            sums = {k: v + sums[k] if sums else v for k, v in micro_sums.items()}
        return loss, sums

    def can_share_prompts(self) -> bool:
        """Whether `step` may be given batches that were packed with shared prompts."""
        return can_share_prompts(self._model)

    def write_weights(self, directory: str) -> float:
        """Writes the current weights for the engines to load; returns the seconds it took."""
        began = time.perf_counter()
        policy_export.publish(self._model, Path(directory))
        return time.perf_counter() - began

    @torch.no_grad()
    def score_tokens(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each token but the first, at temperature 1: `[T-1]` per sequence."""
        self._engine.eval()
        scored = []
        for token_ids in sequences:
            ids = torch.tensor([list(token_ids)], device=self._engine.device)
            positions = torch.arange(ids.numel(), device=ids.device)[None]
            logprobs, _ = self._engine(ids, positions, 1.0)
            scored.append(logprobs[0, 1:].tolist())
        return scored

    def save_policy(self, directory: str, tokenizer_path: str) -> None:
        """Writes the policy in Hugging Face's format, adapters merged, tokenizer included."""
        policy_export.save_policy(self._model, directory, tokenizer_path)

    def save_adapter(self, directory: str) -> None:
        """Writes the adapter alone in PEFT's format; only for a learner with `lora`."""
        assert self._adapted is not None, "policy.lora is not set: there is no adapter"
        policy_export.save_adapter(self._adapted, directory)

    def save_checkpoint(self, directory: str, version: PolicyVersion) -> None:
        """Writes all that the next step depends on; `directory` is whole or not there."""
        checkpoints.save(
            self._engine,
            Path(directory),
            version=version,
            layout=self._layout,
            counters=checkpoints.Counters(steps=self._steps, skipped=self._skipped),
        )

    def _tensors(self, batch: MicroBatch) -> dict[str, Tensor]:
        device = self._engine.device
        arrays = {field.name: getattr(batch, field.name) for field in fields(MicroBatch)}
        # Arrays that came through Ray are read-only views; torch wants memory it may write.
        return {
            name: torch.from_numpy(np.array(array)).to(device)
            for name, array in arrays.items()
            if array is not None
        }

    def _set_learning_rate(self) -> float:
        rate = learning_rate(
            self._steps,
            peak=self._settings.learning_rate,
            schedule=self._settings.schedule,
            warmup_steps=self._settings.warmup_steps,
            num_steps=self._num_steps,
        )
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _count_skipped(self, loss: float, grad_norm: float) -> None:
        """DeepSpeed drops a step with a non-finite gradient without a word; count it."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._skipped = 0
            return
        self._skipped += 1
        if self._skipped >= self._settings.max_skipped_steps:
            raise DivergenceError(
                f"{self._skipped} steps in a row had a non-finite loss ({loss}) or gradient norm "
                f"({grad_norm}) and were skipped. Lower rl.learner.learning_rate."
            )
