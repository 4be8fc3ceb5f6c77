"""Answers scored by a reward model: a sequence classifier with one output, through transformers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from posttrain.errors import ModelError
from posttrain.types import Outcome, Prompt, SystemInstruction
from rewards.score import Finding, Score, Unscored

NAME = "reward_model"


class RewardModelSettings(BaseModel):
    """`centre` and `scale` say where on the model's own scale an answer is as good as not and how
    far from there it counts: correctness = σ((output − centre) / scale), which for a Bradley-Terry
    model (centre 0, scale 1) is the probability of being preferred to an answer that scores 0."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, description="directory or hub name")
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = Field(default=8, gt=0)
    max_length: int = Field(default=4096, gt=0, description="tokens of prompt and answer")
    centre: float = Field(default=0.0, allow_inf_nan=False)
    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    success_from: float = Field(default=0.5, gt=0, lt=1, description="correctness of a success")
    deadline_s: float = Field(default=120.0, gt=0, description="seconds for one group")


class _Model(NamedTuple):
    model: Any
    tokenizer: Any


def score_texts(
    prompt: Prompt,
    texts: Sequence[str],
    system: SystemInstruction | None,
    settings: RewardModelSettings,
) -> tuple[Finding, ...]:
    """One finding per completion, in order; unscored are those longer than the model takes and
    those whose output is no number. Raises ModelError for a model that cannot be used."""
    loaded = _load(settings)
    sequences = [_encode(loaded.tokenizer, prompt, text, system) for text in texts]
    fitting = [i for i, ids in enumerate(sequences) if len(ids) <= settings.max_length]
    fitting.sort(key=lambda index: len(sequences[index]))  # little padding
    findings: list[Finding] = [
        Unscored(f"{len(ids)} tokens, the reward model takes {settings.max_length}")
        for ids in sequences
    ]
    for start in range(0, len(fitting), settings.batch_size):
        batch = fitting[start : start + settings.batch_size]
        outputs = _forward(loaded, [sequences[index] for index in batch])
        for index, output in zip(batch, outputs, strict=True):
            findings[index] = _finding(output, settings)
    return tuple(findings)


def _finding(output: float, settings: RewardModelSettings) -> Finding:
    if not math.isfinite(output):
        return Unscored(f"the reward model's output is {output}")
    correctness = _sigmoid((output - settings.centre) / settings.scale)
    return Score(
        correctness=correctness,
        outcome=Outcome.CORRECT if correctness >= settings.success_from else Outcome.WRONG,
        explanation=f"the reward model's output is {output:.4g}",
    )


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _encode(
    tokenizer: Any, prompt: Prompt, text: str, system: SystemInstruction | None
) -> list[int]:
    """As a conversation where the tokenizer has a chat template, else as a pair of texts."""
    turns = [message.as_dict() for message in prompt.messages]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system.text})
    if tokenizer.chat_template is None:
        question = "\n\n".join(turn["content"] for turn in turns)
        return list(tokenizer(question, text)["input_ids"])
    turns.append({"role": "assistant", "content": text})
    return list(tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"])


def _forward(loaded: _Model, sequences: Sequence[Sequence[int]]) -> list[float]:
    """Padded on the right. Classifiers on decoders look for the last token that is not padding, and
    many tokenizers pad with a token that also ends a turn: so padding is an id of no sequence."""
    import torch

    used = set(itertools.chain.from_iterable(sequences))
    vocabulary = range(loaded.model.get_input_embeddings().num_embeddings)
    padding = next((token for token in vocabulary if token not in used), None)
    if padding is None and len(sequences) > 1:
        return [output for ids in sequences for output in _forward(loaded, [ids])]
    loaded.model.config.pad_token_id = padding
    length = max(map(len, sequences))
    rows = [[*ids, *[padding] * (length - len(ids))] for ids in sequences]
    mask = [[1] * len(ids) + [0] * (length - len(ids)) for ids in sequences]
    device = loaded.model.device
    with torch.inference_mode():
        logits = loaded.model(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
        ).logits
    return [float(value) for value in logits[:, 0].float().cpu()]


@lru_cache(maxsize=1)
def _load(settings: RewardModelSettings) -> _Model:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model, trust_remote_code=False)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            settings.model,
            dtype=getattr(torch, settings.dtype),
            trust_remote_code=False,
            output_loading_info=True,
        )
        model = model.to(settings.device).eval()
    except Exception as error:  # a damaged file raises whatever its parser stumbles over
        raise ModelError(
            f"rewards.{NAME}.model: {settings.model!r} cannot be loaded as a sequence classifier: "
            f"{error}"
        ) from error
    if report["missing_keys"]:  # transformers fills in random numbers
        raise ModelError(
            f"rewards.{NAME}.model: {settings.model!r} lacks {sorted(report['missing_keys'])}: it "
            "is no trained reward model"
        )
    if model.config.num_labels != 1:
        raise ModelError(
            f"rewards.{NAME}.model: {settings.model!r} has {model.config.num_labels} outputs; a "
            "reward model has one"
        )
    return _Model(model, tokenizer)
