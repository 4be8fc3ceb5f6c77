"""Whether a model's logits are what its head makes of the last hidden states, and nothing else.

Learner and teacher ask the backbone and the head, never the model, so that not all logits exist at
once. An architecture that scales or caps them afterwards would silently be another one there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from posttrain.errors import ModelError
from posttrain.workers.gather import whole

TOKENS = 4
LARGEST_LOGIT = 100.0
"""Beyond what any architecture caps at. Random weights never get there by themselves."""
TOLERANCE = 0.01
"""Of the largest logit. Both sides are the same product, so that even bf16 rounds by less."""


def check_head(model_path: str, model: Any) -> None:
    """Called by all ranks at once. Only the head computes, on hidden states that are made up.

    Raises:
        ModelError: the model's own forward pass gives other logits than its head does.
    """
    head = model.get_output_embeddings()
    with whole(list(head.parameters())), torch.no_grad():
        hidden = _hidden_states(head)
        expected = head(hidden).float()
        token_ids = torch.zeros(1, TOKENS, dtype=torch.int64, device=hidden.device)
        with _standing_in(model, hidden):
            logits = model(input_ids=token_ids, use_cache=False).logits.float()
    moved = ((logits - expected).abs().max() / LARGEST_LOGIT).item()
    if not moved <= TOLERANCE:
        raise ModelError(
            f"{model_path!r}: {type(model).__name__} changes what its head gives by {moved:.0%} "
            "of the largest logit, as final_logit_softcapping, logits_scaling or logit_scale in "
            "config.json do. Learner and teacher would leave that out, so such an architecture is "
            "not supported; take another model"
        )


def refuse_head_bias(model: Any) -> None:
    """ModelError if more than a product with the head's weight makes the logits."""
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ModelError(
            f"{model.name_or_path!r}: the head of {type(model).__name__} has a bias, which the "
            "learner would leave out, so such an architecture cannot be trained by rl; take "
            "another model"
        )


def _hidden_states(head: Any) -> Tensor:
    """`[1, TOKENS, H]`, of which the head makes logits up to about `LARGEST_LOGIT`."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, TOKENS, head.weight.shape[-1], generator=generator)
    hidden = hidden.to(device=head.weight.device, dtype=head.weight.dtype)
    largest: Tensor = head(hidden).abs().max()
    return hidden * (LARGEST_LOGIT / largest.clamp(min=1e-3))


@contextmanager
def _standing_in(model: Any, hidden: Tensor) -> Iterator[None]:
    """Meanwhile `hidden` is what the backbone answers; its weights are not asked, which ZeRO-3 may
    have divided."""
    # Models that are half of an encoder and a decoder ask the decoder alone.
    asked = {model.base_model, model.get_decoder()} - {model}
    for backbone in asked:
        backbone.forward = lambda *_, **__: _Answer(hidden)
    try:
        yield
    finally:
        for backbone in asked:
            del backbone.forward  # of the object; that of its class is still there


class _Answer:
    """A backbone's output, by name or by index. Whatever else a model asks for is not there."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None
