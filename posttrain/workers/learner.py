"""The policy's training weights on a DeepSpeed engine: steps, publishing, export.

A plain class. It runs in a Ray actor or in a process of its own, never in an engine's process.
"""

from __future__ import annotations

import copy
import math
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from posttrain.errors import DivergenceError, ModelError
from posttrain.losses.aggregate import Denominators
from posttrain.losses.diagnostics import diagnostic_sums, summarise
from posttrain.losses.logprobs import token_logprobs
from posttrain.losses.objective import policy_loss
from posttrain.types import MicroBatch, TrainingBatch
from posttrain.workers.settings import LearnerSettings, merged
from posttrain.workers.weights import with_lm_head, write_weights


class PolicyLoss(nn.Module):
    """A causal language model whose forward pass is the loss of one micro-batch.

    The loss lives inside the wrapped module so that DeepSpeed's hooks see the whole pass.
    """

    def __init__(
        self, model: Any, settings: LearnerSettings, temperature: float, max_age: int
    ) -> None:
        super().__init__()
        self.model = model
        # In a list: what is not trained must be no submodule, or DeepSpeed would shard it too.
        self._reference = [_frozen_copy(model)] if settings.loss.kl_coefficient > 0 else []
        self._settings = settings
        self._temperature = temperature
        self._max_age = max_age

    def forward(
        self, batch: dict[str, Tensor], over: Denominators
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the loss, and its `diagnostic_sums`."""
        logprobs, entropy = self._token_logprobs(self.model, batch)
        share = policy_loss(
            logprobs,
            batch,
            over,
            self._settings.loss,
            # A batch trains one step, so the policy that starts it is the one that is trained.
            old_logprobs=logprobs.detach(),
            ref_logprobs=self._ref_logprobs(batch),
        )
        return share.loss, diagnostic_sums(logprobs, entropy, batch, share, self._max_age)

    @torch.no_grad()
    def _ref_logprobs(self, batch: dict[str, Tensor]) -> Tensor | None:
        if not self._reference:
            return None
        reference = self._reference[0].to(batch["token_ids"].device)
        return self._token_logprobs(reference, batch)[0]

    def _token_logprobs(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        hidden = model.model(
            input_ids=batch["token_ids"],
            position_ids=batch["position_ids"],
            use_cache=False,  # with a cache, packed sequences would see each other
        ).last_hidden_state
        return token_logprobs(
            hidden,
            model.lm_head.weight,
            batch["token_ids"],
            self._temperature,
            self._settings.logprob_chunk_tokens,
        )


def _frozen_copy(model: Any) -> Any:
    return copy.deepcopy(model).requires_grad_(False).eval()


class DeepSpeedLearner:
    """Owns the policy's weights and optimizer state during online RL.

    Args:
        model_path: a checkpoint directory or hub name that transformers loads.
        temperature: the sampling temperature of the rollouts; the loss's log-probabilities use it.
        max_age: the lag bound; diagnostics are kept by age up to it.
        max_tokens: the limit of a completion, which Dr.GRPO divides by.
    """

    def __init__(
        self,
        model_path: str,
        settings: LearnerSettings,
        *,
        temperature: float,
        max_age: int,
        max_tokens: int,
        seed: int,
    ) -> None:
        _prepare_process(settings, seed)
        import deepspeed
        from transformers import AutoModelForCausalLM

        deepspeed.init_distributed(dist_backend=_backend(), verbose=False)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                model_path, dtype=getattr(torch, settings.dtype), attn_implementation="sdpa"
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"transformers cannot load {model_path!r}: {error}") from error
        self._settings = settings
        self._max_tokens = max_tokens
        self._module = PolicyLoss(model, settings, temperature, max_age)
        self._engine, _, _, _ = deepspeed.initialize(
            model=self._module, model_parameters=model.parameters(), config=_ds_config(settings)
        )
        self._device = next(model.parameters()).device
        self._skipped = 0
        self._steps = 0

    def step(self, batch: TrainingBatch) -> dict[str, float]:
        """One optimizer step over all micro-batches.

        Raises:
            DivergenceError: `max_skipped_steps` steps in a row had a non-finite loss or gradient.
        """
        began = time.perf_counter()
        self._set_learning_rate()
        loss = 0.0
        sums: dict[str, Tensor] = {}
        over = Denominators(batch.num_loss_tokens, batch.num_sequences, self._max_tokens)
        last = len(batch.micro_batches) - 1
        for index, micro_batch in enumerate(batch.micro_batches):
            self._engine.set_gradient_accumulation_boundary(is_boundary=index == last)
            share, micro_sums = self._engine(self._tensors(micro_batch), over)
            self._engine.backward(share)
            self._engine.step()
            loss += share.item()
            sums = {k: v + sums[k] if sums else v for k, v in micro_sums.items()}
        grad_norm = float(self._engine.get_global_grad_norm())
        self._count_skipped(loss, grad_norm)
        self._steps += 1
        return {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": self._learning_rate(self._steps - 1),
            "skipped_steps": float(self._skipped),
            "step_s": time.perf_counter() - began,
        } | summarise(sums)

    def write_weights(self, directory: str) -> float:
        """Writes the current weights for the engines to load; returns the seconds it took."""
        began = time.perf_counter()
        write_weights(self._state(), Path(directory))
        return time.perf_counter() - began

    def score_tokens(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each token but the first, at temperature 1: `[T-1]` per sequence."""
        model = self._module.model
        scored = []
        with torch.no_grad():
            for token_ids in sequences:
                ids = torch.tensor([list(token_ids)], device=self._device)
                hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
                logprobs, _ = token_logprobs(hidden, model.lm_head.weight, ids, 1.0, ids.numel())
                scored.append(logprobs[0, 1:].tolist())
        return scored

    def save_policy(self, directory: str, tokenizer_path: str) -> None:
        """Writes the policy in Hugging Face's format, tokenizer and template included."""
        from transformers import AutoTokenizer

        self._module.model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(tokenizer_path).save_pretrained(directory)

    def _state(self) -> dict[str, Tensor]:
        model = self._module.model
        tied = bool(model.config.tie_word_embeddings)
        state = {k: v.detach().cpu() for k, v in model.state_dict().items()}
        if tied:
            state.pop("lm_head.weight")
        return with_lm_head(state, tied=tied)

    def _tensors(self, batch: MicroBatch) -> dict[str, Tensor]:
        fields = (
            "token_ids",
            "position_ids",
            "loss_mask",
            "rollout_logprobs",
            "advantages",
            "ages",
        )
        # Arrays that came through Ray are read-only views; torch wants memory it may write.
        return {f: torch.from_numpy(np.array(getattr(batch, f))).to(self._device) for f in fields}

    def _learning_rate(self, step: int) -> float:
        warmup = min(1.0, (step + 1) / (self._settings.warmup_steps + 1))
        return self._settings.learning_rate * warmup

    def _set_learning_rate(self) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self._learning_rate(self._steps)

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


def _prepare_process(settings: LearnerSettings, seed: int) -> None:
    """What must be set before DeepSpeed is imported."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(settings.threads)
    if "MASTER_ADDR" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
        }
    torch.manual_seed(seed)


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def _ds_config(settings: LearnerSettings) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        # Boundaries are set by hand: micro-batches are cut by tokens, their number varies, and the
        # loss already carries the batch's denominator.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": {"stage": settings.zero_stage},
        "bf16": {"enabled": settings.dtype == "bfloat16"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": settings.learning_rate,
                "betas": list(settings.betas),
                "weight_decay": settings.weight_decay,
                # The fused CPU kernel would have to be compiled first.
                "torch_adam": True,
            },
        },
    }
    return merged(config, settings.deepspeed)
