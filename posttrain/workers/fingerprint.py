"""What tensors were when they were written, so that a reader can tell that they still are.

A fingerprint is one line for each tensor: data type, shape and the 128-bit XXH3 of its bytes, which
is several times faster than copying them. It guards against cut, mixed-up and damaged transfers,
not against an adversary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from posttrain.errors import MismatchError

Fingerprint = Mapping[str, str]
"""Tensor name -> its line, which begins with the data type."""

SHOWN = 3


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """The fingerprint of contiguous tensors in host memory."""
    return {name: _line(tensor) for name, tensor in tensors}


def _line(tensor: torch.Tensor) -> str:
    digest = xxhash.xxh3_128_hexdigest(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {digest}"


def main_dtype(published: Fingerprint) -> str:
    """The data type of most tensors, by torch's name; a router may keep another one."""
    counts = Counter(line.split(maxsplit=1)[0] for line in published.values())
    return counts.most_common(1)[0][0]


def check_arrival(file: Path, published: Fingerprint) -> None:
    """Raises MismatchError unless the safetensors in `file` are those that were published."""
    try:
        with safe_open(file, framework="pt") as tensors:
            names = tensors.offset_keys()
            arrived = fingerprint((name, tensors.get_tensor(name)) for name in names)
    except SafetensorError as error:
        raise MismatchError(f"published weights arrived as an unreadable file: {error}") from error
    differing = sorted(
        name
        for name in published.keys() | arrived.keys()
        if published.get(name) != arrived.get(name)
    )
    if differing:
        shown = "; ".join(
            f"{name}: sent {published.get(name)}, arrived {arrived.get(name)}"
            for name in differing[:SHOWN]
        )
        raise MismatchError(
            f"{len(differing)} of {len(published)} published tensors arrived differently and were "
            f"not loaded: {shown}. Look for a full or faulty disk or memory on that machine."
        )
