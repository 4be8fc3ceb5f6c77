"""How large a model is, from its configuration and the headers of its weights alone."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import ModelError

EXPERT = ".experts."


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Numbers of parameters and what sizes activations and KV cache. `expert_parameters` are those
    of routed experts; `adapter_width` is what one rank of a low-rank adapter on every linear layer
    but those and the head adds."""

    parameters: int
    expert_parameters: int
    adapter_width: int
    layers: int
    hidden_size: int
    kv_heads: int
    head_dim: int
    vocab_size: int


def read_shape(model: str, setting: str = "policy.model") -> ModelShape:
    """Of a checkpoint directory or a name on the hub, of which only headers are fetched. `setting`
    is the one that names it, for the errors.

    Raises:
        ModelError: neither; or its configuration or weights cannot be read.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config()
        tensors = dict(_local(Path(model)) if Path(model).is_dir() else _on_hub(model))
    except Exception as error:  # damaged files and the network raise whatever they like
        raise ModelError(f"{setting}: the size of {model} cannot be read: {error}") from error
    if not tensors:
        raise ModelError(f"{setting}: {model} holds no safetensors")
    return shape_of(tensors, config)


def shape_of(tensors: dict[str, list[int]], config: Any) -> ModelShape:
    """From the tensors' names and shapes and transformers' text configuration."""
    heads = config.num_attention_heads
    return ModelShape(
        parameters=sum(map(math.prod, tensors.values())),
        expert_parameters=sum(math.prod(s) for n, s in tensors.items() if EXPERT in n),
        adapter_width=sum(
            sum(shape)
            for name, shape in tensors.items()
            if len(shape) == 2 and not any(p in name for p in (EXPERT, "embed", "lm_head"))
        ),
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
    )


def _local(directory: Path) -> Iterator[tuple[str, list[int]]]:
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as content:
            (length,) = struct.unpack("<Q", content.read(8))
            header = json.loads(content.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                yield name, tensor["shape"]


def _on_hub(name: str) -> Iterator[tuple[str, list[int]]]:
    from huggingface_hub import get_safetensors_metadata

    for file in get_safetensors_metadata(name).files_metadata.values():
        for tensor, info in file.tensors.items():
            yield tensor, info.shape
