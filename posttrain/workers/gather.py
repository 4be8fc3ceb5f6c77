"""Tensors that ZeRO-3 divides over the ranks, whole for a moment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor


def is_divided(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_id")


@contextmanager
def whole(tensors: Sequence[Tensor]) -> Iterator[None]:
    """On all ranks at once, for reading: what is written to them is lost."""
    divided = [tensor for tensor in tensors if is_divided(tensor)]
    if not divided:  # a teacher never needs DeepSpeed
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(divided):
        yield
