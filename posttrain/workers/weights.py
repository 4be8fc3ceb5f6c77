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
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embeddings")
"""How architectures call the module whose weight a tied head shares."""


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
    """The tensors of a Hugging Face checkpoint directory, named as an engine wants them.

    ModelError if there are none, or the embedding that is also the head is not found among them.
    """
    state: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        state |= load_file(file)
    if not state:
        raise ModelError(f"{directory} holds no safetensors")
    if "lm_head.weight" in state or not _ties_its_head(directory):
        return state
    return with_lm_head(state, tied=True, embedding=_embedding_of(state, directory))


def _ties_its_head(directory: Path) -> bool:
    """Many a config.json leaves out what is its architecture's default."""
    from transformers import AutoConfig

    return bool(getattr(AutoConfig.from_pretrained(directory), "tie_word_embeddings", False))


def _embedding_of(state: Mapping[str, torch.Tensor], directory: Path) -> str:
    found = [name for name in state if name.split(".")[-2:] in [[e, "weight"] for e in EMBEDDINGS]]
    if not found:
        raise ModelError(
            f"{directory / 'config.json'} ties the head to the embedding, and none of the tensors "
            f"beside it, such as {min(state)}, is called as embeddings are "
            f"({', '.join(EMBEDDINGS)}): save the checkpoint with its head, as lm_head.weight"
        )
    return min(found, key=len)  # layers that predict further tokens may have another one


def loadable(state: Mapping[str, torch.Tensor], engine: str) -> dict[str, torch.Tensor]:
    """`state` for an engine that computes in the data type `engine`, whatever it was saved in: 16
    bits that are not the engine's own become fp32. That is exact, and the engine rounds fp32 as it
    does with a checkpoint that it starts from."""
    other = {torch.bfloat16, torch.float16} - {getattr(torch, engine)}
    return {name: t.float() if t.dtype in other else t for name, t in state.items()}


def remove_weights(directory: Path) -> None:
    shutil.rmtree(directory)


def scratch_directory(run_id: str) -> Path:
    """Where a run's published weights lie; named after the run so that leftovers can be found."""
    return SHARED_MEMORY / f"posttrain-{run_id}"


def clear_scratch(run_id: str) -> bool:
    """Removes what a killed driver of the same run left in shared memory; True if there was any."""
    return clear_leftovers(scratch_directory(run_id))


def clear_leftovers(directory: Path) -> bool:
    """Removes published weights that nobody will fetch any more; True if there were any."""
    if not directory.exists():
        return False
    shutil.rmtree(directory)
    return True
