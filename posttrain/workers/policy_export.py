"""The policy's weights on their way out: gathered from the ranks, adapters merged, heads named.

Every rank calls these functions, because under ZeRO-3 each holds a part of every tensor. One tensor
is whole at a time, and only rank 0 keeps it. What is trained is read and never written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from posttrain.atomic import staged_directory
from posttrain.workers.experts import divided_layers, whole_layer
from posttrain.workers.gather import is_divided, whole
from posttrain.workers.weights import with_lm_head, write_weights

ADAPTER = "default"
"""PEFT's name of the one adapter there is."""


def publish(model: Any, directory: Path) -> None:
    """Writes what an engine loads: a checkpoint's tensors with the head always among them."""
    from transformers.core_model_loading import revert_weight_conversion

    state = policy_state(model)
    if dist.get_rank() == 0:
        # Routed experts are one tensor in transformers and many in a checkpoint.
        state = revert_weight_conversion(model, state)
        embedding = _name_of(model, model.get_input_embeddings().weight)
        write_weights(with_lm_head(state, tied=_tied(model), embedding=embedding), directory)


def save_policy(
    model: Any, directory: str, tokenizer_path: str, dtype: torch.dtype | None = None
) -> None:
    """A Hugging Face checkpoint, adapters merged, tokenizer and template included; `directory` is
    whole or not there. `dtype` is that of its weights, where training may hold them in another."""
    from transformers import AutoTokenizer

    state = policy_state(model)
    if dist.get_rank() == 0:
        if dtype is not None:
            state = {name: tensor.to(dtype) for name, tensor in state.items()}
        with staged_directory(Path(directory)) as staged:
            save_model(model, staged, state)
            AutoTokenizer.from_pretrained(tokenizer_path).save_pretrained(staged)


def save_model(model: Any, directory: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """As transformers saves it, with generation settings as they came: some published checkpoints'
    contradict themselves (a temperature, and no sampling), and transformers refuses to write those.
    """
    came = model.generation_config
    if came is None:
        model.save_pretrained(directory, state_dict=state)
        return
    model.generation_config = type(came)()
    try:
        model.save_pretrained(directory, state_dict=state)
    finally:
        model.generation_config = came
    came.to_json_file(directory / "generation_config.json", keys_to_pop=["compile_config"])


def save_adapter(adapted: Any, directory: str) -> None:
    """The adapter alone, in PEFT's format. `adapted` is PEFT's view of the model."""
    weights = {n: t for n, t in adapted.state_dict(keep_vars=True).items() if ".lora_" in n}
    with whole(list(weights.values())):
        if dist.get_rank() == 0:
            adapted.save_pretrained(directory, state_dict=weights)


def policy_state(model: Any) -> dict[str, Tensor]:
    """Name -> tensor on the CPU as a model without adapters has them, a tied head left out; empty
    on all ranks but the first. Where nothing is divided and no adapter merged, the tensors are the
    trained ones themselves, not copies."""
    adapted = {name: m for name, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    expert_layers = divided_layers(model)
    elsewhere = tuple(f"{name}." for name in expert_layers)
    head = _name_of(model, model.get_output_embeddings().weight, last=True)
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.startswith(elsewhere) or ".lora_" in name or (name == head and _tied(model)):
            continue
        owner, _, leaf = name.rpartition(".base_layer.")
        layer = adapted[owner] if leaf == "weight" and owner else None
        with whole([tensor, *_adapter_weights(layer)]), torch.no_grad():
            if dist.get_rank() == 0:
                value = tensor
                if layer is not None:
                    # In bf16 what an adapter changes by less than a rounding is lost here; the
                    # learner's own forward pass adds it to the output instead.
                    value = (tensor + layer.get_delta_weight(ADAPTER)).to(tensor.dtype)
                # What was gathered is gone after this block.
                value = value.detach().to("cpu", copy=is_divided(tensor))
                state[f"{owner}.{leaf}" if owner else name] = value
    for name, layer in expert_layers.items():
        state |= {f"{name}.{part}": tensor for part, tensor in whole_layer(layer).items()}
    return state


def _adapter_weights(layer: Any) -> list[Tensor]:
    if layer is None:
        return []
    return [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]


def _tied(model: Any) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def _name_of(model: Any, weight: Tensor, *, last: bool = False) -> str:
    state: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
    names = [name for name, tensor in state.items() if tensor is weight]
    return names[-1 if last else 0]
