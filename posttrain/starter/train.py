"""Trains the starter policy: `python -m posttrain.starter.train --out DIR`.

Two phases, one optimizer schedule. First steps dominate, so that the algorithms are learned; then
the mixture of `tasks` (steps in a quarter of the plain answers) sets how often the policy *uses*
them. The number of optimizer steps and every seed are fixed, so that a rerun reproduces the figures
up to the order of floating-point sums.

With `--teacher` its teacher: the starter trained on, with steps in three quarters of the plain
answers. It knows the algorithms better and uses them more often.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from posttrain.starter import POLICY_DIR
from posttrain.starter.families import FAMILIES, LEVELS
from posttrain.starter.instructions import BRACKETS, SYSTEM_INSTRUCTIONS
from posttrain.starter.tasks import (
    STEPWISE_SHARE,
    completion,
    draw_instruction,
    in_training_split,
    is_stepwise,
)
from posttrain.starter.tokenizer import VOCABULARY, build_tokenizer

if TYPE_CHECKING:
    import torch

IGNORED = -100
INSTRUCTION_TEXT = {i.name: i.text for i in SYSTEM_INSTRUCTIONS}
IDS = {token: i for i, token in enumerate(VOCABULARY)}
Example = tuple[list[int], int]
"""Token ids and how many of them are prompt."""


class TrainSettings(BaseModel):
    """`start` is a checkpoint of the same shape to go on from; None starts from random weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: Path | None = None
    seed: int = 0
    steps: int = Field(default=1500, gt=0)
    tokens_per_step: int = Field(default=4096, gt=0)
    learning_rate: float = Field(default=3e-3, gt=0)
    warmup: float = Field(default=0.03, ge=0, lt=1)
    learning_phase: float = Field(default=0.6, ge=0, lt=1, description="share of the steps")
    learning_stepwise: float = Field(default=0.75, ge=0, le=1)
    final_stepwise: float = Field(default=STEPWISE_SHARE, ge=0, le=1)
    hidden_size: int = Field(default=192, gt=0)
    intermediate_size: int = Field(default=384, gt=0)
    num_layers: int = Field(default=4, gt=0)
    num_heads: int = Field(default=6, gt=0)
    max_length: int = Field(default=512, gt=0)


TEACHER = TrainSettings(
    start=POLICY_DIR,
    seed=1,
    steps=900,
    learning_rate=2e-3,
    learning_phase=0.0,
    final_stepwise=0.75,
)
HARDER_TO_LEARN = {"program": 1.75, "expression": 1.5}
LEVEL_WEIGHTS = (1.0, 1.5, 2.0, 2.5, 1.0)
"""The top level is shown rarely: it shall stay out of reach."""
FAMILY_WEIGHTS = [HARDER_TO_LEARN.get(family.name, 1.0) for family in FAMILIES]


def encode(system: str | None, question: str, answer: str) -> Example:
    """What the chat template renders, and the length of its prompt part."""
    prompt = [IDS["<user>"], *(IDS[c] for c in question), IDS["<assistant>"]]
    if system is not None:
        prompt = [IDS["<system>"], *(IDS[c] for c in INSTRUCTION_TEXT[system]), *prompt]
    return [*prompt, *(IDS[c] for c in answer), IDS["<end>"]], len(prompt)


def example(rng: Random, stepwise_share: float) -> Example:
    """One training example; its prompt is never a held-out one."""
    while True:
        family = rng.choices(FAMILIES, FAMILY_WEIGHTS)[0]
        task = family.make(rng, rng.choices(LEVELS, LEVEL_WEIGHTS)[0])
        if in_training_split(task.question):
            break
    system = draw_instruction(rng)
    stepwise = is_stepwise(rng, system, stepwise_share)
    text = completion(task, stepwise=stepwise, brackets=system == BRACKETS.name)
    return encode(system, task.question, text)


def batches(rng: Random, tokens: int, stepwise_share: float) -> Iterator[list[Example]]:
    """Batches of about `tokens` tokens, padding included; similar lengths stand together."""
    while True:
        pool = sorted((example(rng, stepwise_share) for _ in range(4096)), key=lambda e: len(e[0]))
        made: list[list[Example]] = []
        while pool:
            size = max(1, tokens // len(pool[-1][0]))
            made.append(pool[-size:])
            del pool[-size:]
        rng.shuffle(made)
        yield from made


def build_model(settings: TrainSettings) -> Any:
    """A Qwen3 with tied embeddings, randomly initialised unless there is a `start`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if settings.start is not None:
        return Qwen3ForCausalLM.from_pretrained(settings.start, dtype="float32")
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        head_dim=32,
        max_position_embeddings=settings.max_length,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=IDS["<end>"],
        pad_token_id=IDS["<pad>"],
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def build_optimizers(model: Any, settings: TrainSettings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    import torch

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(
            matrices, lr=settings.learning_rate, adjust_lr_fn="match_rms_adamw", weight_decay=0.01
        ),
        torch.optim.AdamW(others, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate_factor(step: int, settings: TrainSettings) -> float:
    """Linear warm-up, then cosine to zero."""
    warmup = settings.warmup * settings.steps
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (settings.steps - warmup)))


def loss_of(model: Any, batch: list[Example]) -> torch.Tensor:
    """Negative log-likelihood (nats) of the answer tokens, summed, over the batch's size `[R, L]`.

    The batch's own number of answer tokens would be the wrong denominator: batches of short rows
    have few, and direct answers would weigh more than stepwise ones. Padding stands on the right,
    where causal attention never looks, so no attention mask is needed.
    """
    import torch
    import torch.nn.functional as F

    length = max(len(ids) for ids, _ in batch)
    inputs = torch.full((len(batch), length), IDS["<pad>"])
    labels = torch.full((len(batch), length), IGNORED)
    for row, (ids, prompt_length) in enumerate(batch):
        inputs[row, : len(ids)] = torch.tensor(ids)
        labels[row, prompt_length : len(ids)] = inputs[row, prompt_length : len(ids)]
    logits = model(input_ids=inputs, use_cache=False).logits
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total / inputs.numel()


def train(settings: TrainSettings, minutes: float) -> Any:
    """The trained model. Raises TimeoutError after `minutes`: a shorter run is another model."""
    import torch

    torch.manual_seed(settings.seed)
    rng = Random(settings.seed)
    model = build_model(settings).train()
    optimizers = build_optimizers(model, settings)
    learning_steps = round(settings.learning_phase * settings.steps)
    start, average = time.monotonic(), 0.0
    phases = (
        (learning_steps, settings.learning_stepwise),
        (settings.steps - learning_steps, settings.final_stepwise),
    )
    step = 0
    for count, stepwise_share in phases:
        for batch in islice(batches(rng, settings.tokens_per_step, stepwise_share), count):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate * learning_rate_factor(step, settings)
            loss = loss_of(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            average = 0.98 * average + 0.02 * loss.item()
            step += 1
            if step % 50 == 0:
                seconds = time.monotonic() - start
                print(
                    f"step {step} loss {average:.3f} {seconds:.0f} s", file=sys.stderr, flush=True
                )
                if seconds > 60 * minutes:
                    raise TimeoutError(f"step {step} of {settings.steps} after {minutes} minutes")
    return model.eval()


def save(model: Any, out: Path, max_length: int) -> None:
    """Writes weights, tokenizer, chat template and generation_config as `from_pretrained` reads
    them."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        eos_token_id=IDS["<end>"], pad_token_id=IDS["<pad>"], do_sample=True, temperature=1.0
    )
    model.save_pretrained(out)
    build_tokenizer(max_length).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0, help="give up after so long")
    parser.add_argument("--teacher", action="store_true", help="the starter's teacher instead")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--steps", type=int)
    arguments = parser.parse_args()
    given = {name: getattr(arguments, name) for name in ("seed", "steps")}
    defaults = TEACHER if arguments.teacher else TrainSettings()
    settings = defaults.model_copy(update={k: v for k, v in given.items() if v is not None})
    save(train(settings, arguments.minutes), arguments.out, settings.max_length)


if __name__ == "__main__":
    main()
