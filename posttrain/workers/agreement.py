"""Whether engine and learner speak of the same model, before anything is trained."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import ModelError

HALF = {"bfloat16", "float16"}


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What must be the same on both sides for token ids to mean the same."""

    vocab_size: int
    tokenizer: str


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 (hex) of which id stands for which token and which ids are special."""
    content = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_ids)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def facts_of_checkpoint(directory: Path) -> ModelFacts:
    """Raises ModelError if it has no readable configuration or tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(directory).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{str(directory)!r} cannot be read: {error}") from error
    return ModelFacts(vocab_size=config.vocab_size, tokenizer=tokenizer_fingerprint(tokenizer))


SHAPE = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "tie_word_embeddings", "num_experts", "num_local_experts"),
)
"""What two configurations must share for an engine to change from one's weights to the other's."""

COMPUTATION = (
    *("rope_parameters", "rope_theta", "partial_rotary_factor", "layer_types", "sliding_window"),
    *("attention_chunk_size", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"),
    *("hidden_act", "hidden_activation", "activation_function", "num_experts_per_tok"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"),
    *("logits_scaling", "logit_scale", "attention_multiplier", "residual_multiplier"),
    "embedding_multiplier",
)
"""Likewise, although the weights would fit: with another value they make another model."""


def check_same_model(one: Path, other: Path) -> None:
    """Raises ModelError unless the checkpoint `one` has architecture, vocabulary and tokenizer of
    `other`: an engine changes from one's weights to the other's and keeps all else."""
    mine_of, theirs_of = _config_of(one), _config_of(other)
    for key in SHAPE + COMPUTATION:
        mine, theirs = mine_of[key], theirs_of[key]
        if mine != theirs:
            raise ModelError(
                f"{one} has {key} = {mine} and the policy {other} has {theirs}: every stage works "
                "on checkpoints of the same model"
            )
    if facts_of_checkpoint(one) != facts_of_checkpoint(other):
        raise ModelError(
            f"{one} has another vocabulary or tokenizer than the policy {other}: every stage works "
            "on checkpoints of the same model"
        )


def _config_of(checkpoint: Path) -> dict[str, Any]:
    """As transformers reads it: versions write the same under different names."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint).get_text_config()
    return {key: _named_once(getattr(config, key, None)) for key in SHAPE + COMPUTATION}


def _named_once(value: Any) -> Any:
    """A rotary embedding's `type` is its `rope_type`, which transformers adds."""
    if not isinstance(value, dict):
        return value
    return {key: _named_once(inner) for key, inner in value.items() if key != "type"}


def check_model(learner: ModelFacts, engine: ModelFacts) -> None:
    """Raises ModelError if token ids mean different things to the two."""
    if learner.vocab_size != engine.vocab_size:
        raise ModelError(
            f"the learner's model has a vocabulary of {learner.vocab_size} tokens and the engine's "
            f"one of {engine.vocab_size}: let every stage start from the same checkpoint"
        )
    if learner.tokenizer != engine.tokenizer:
        raise ModelError(
            "the learner's tokenizer gives other ids to some tokens than the engine's, although "
            f"both have {engine.vocab_size}: let every stage start from the same checkpoint"
        )


def check_dtype(
    published: str, engine: str, setting: str = "resources.rollout.engine.dtype"
) -> None:
    """An engine computes in the learner's data type, or in 16 bits under fp32 weights. `setting`
    names the engine's.

    Raises:
        ModelError: anything else, which would cost accuracy or memory and gain nothing.
    """
    if published == engine or (published == "float32" and engine in HALF):
        return
    raise ModelError(
        f"the learner publishes {published} weights to an engine that computes in {engine}: set "
        f"{setting} and rl.learner.dtype to the same, or the engine's to bfloat16 under a float32 "
        "learner"
    )
