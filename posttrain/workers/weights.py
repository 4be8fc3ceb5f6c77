"""Weights as files that an engine can load: names, tied heads, fingerprints, shared memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from posttrain.errors import ModelError
from posttrain.workers.fingerprint import Fingerprint, fingerprint

SHARED_MEMORY = Path("/dev/shm")
WEIGHTS = "model.safetensors"
FINGERPRINT = "fingerprint.json"


def with_lm_head(
    state: Mapping[str, torch.Tensor], *, tied: bool, embedding: str = "model.embed_tokens.weight"
) -> dict[str, torch.Tensor]:
    """The state dict with `lm_head.weight` named beside a tied embedding.

    vLLM's `reload_weights` keeps the old head of a tied model otherwise, without a word.
    """
    named = dict(state)
    if tied:
        # A copy, because safetensors refuses two names for one storage.
        named["lm_head.weight"] = named[embedding].clone()
    return named


def write_weights(state: Mapping[str, torch.Tensor], directory: Path) -> None:
    """One safetensors file and the fingerprint of what is in memory, in a new directory.

    Readers learn its name only after this returns, so it needs no rename; memory-backed files need
    no fsync.
    """
    directory.mkdir(parents=True)
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(contiguous, directory / WEIGHTS)
    (directory / FINGERPRINT).write_text(json.dumps(fingerprint(contiguous.items())))


def read_fingerprint(directory: Path) -> Fingerprint:
    """Of the weights that `write_weights` wrote there."""
    published: dict[str, str] = json.loads((directory / FINGERPRINT).read_text())
    return published


def read_checkpoint(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of a Hugging Face checkpoint directory, named as an engine wants them."""
    state: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        state |= load_file(file)
    if not state:
        raise ModelError(f"{directory} holds no safetensors")
    config = json.loads((directory / "config.json").read_text())
    tied = bool(config.get("tie_word_embeddings")) and "lm_head.weight" not in state
    return with_lm_head(state, tied=tied)


def remove_weights(directory: Path) -> None:
    shutil.rmtree(directory)


def scratch_directory(run_id: str) -> Path:
    """Where a run's published weights lie; named after the run so that leftovers can be found."""
    return SHARED_MEMORY / f"posttrain-{run_id}"


def clear_scratch(run_id: str) -> bool:
    """Removes what a killed driver of the same run left in shared memory; True if there was any."""
    directory = scratch_directory(run_id)
    if not directory.exists():
        return False
    shutil.rmtree(directory)
    return True
