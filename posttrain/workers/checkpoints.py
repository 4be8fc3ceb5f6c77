"""Checkpoints of the learner: written whole, found again, refused when they do not fit.

A checkpoint is a directory of DeepSpeed's own files, one file per rank with counters
and random states, and a manifest. DeepSpeed's files are pickles: load only those of your own runs.
Which checkpoint counts is the stage's to say (`posttrain.stages.rl_checkpoint`).
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, ValidationError

from posttrain.atomic import staged_directory
from posttrain.errors import ModelError, RunDirError, StageError
from posttrain.types import PolicyVersion
from posttrain.workers.settings import LearnerSettings, LoraSettings, merged

MANIFEST = "manifest.json"
ENGINE_TAG = "engine"
NOT_OF_THE_DISK = (torch.OutOfMemoryError, dist.DistError)
"""RuntimeErrors as well, which say best themselves what went wrong."""


RANKS = "resources.learner.ranks"


class Layout(BaseModel):
    """What must be equal where a checkpoint is written and where it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fingerprint: str
    ranks: int
    zero_stage: int
    expert_parallel: int
    dtype: str
    lora: LoraSettings | None

    @classmethod
    def of(
        cls, settings: LearnerSettings, lora: LoraSettings | None, *, fingerprint: str, ranks: int
    ) -> Layout:
        return cls(
            fingerprint=fingerprint,
            ranks=ranks,
            zero_stage=settings.zero_stage,
            expert_parallel=settings.expert_parallel,
            dtype=settings.dtype,
            lora=lora,
        )


class Manifest(BaseModel):
    """`files` gives the size in bytes of everything else in the directory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["posttrain learner checkpoint 1"] = "posttrain learner checkpoint 1"
    version: str
    layout: Layout
    files: dict[str, int]


class Counters(BaseModel):
    """Of the learner: steps taken, and how many of the last ones in a row were skipped."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int
    skipped: int


def save(
    engine: Any, directory: Path, *, version: PolicyVersion, layout: Layout, counters: Counters
) -> None:
    """Called by all ranks; an existing `directory` is replaced once the new one is on disk.

    StageError if it cannot be written: what was there stays.
    """
    try:
        with _staged_by_first_rank(directory) as partial:
            engine.save_checkpoint(
                str(partial),
                tag=ENGINE_TAG,
                save_latest=False,
                exclude_frozen_parameters=layout.lora is not None,
            )
            torch.save(_rank_state(counters), partial / _rank_file(dist.get_rank()))
            dist.barrier()
            if dist.get_rank() == 0:
                manifest = Manifest(version=str(version), layout=layout, files=_sizes(partial))
                (partial / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
    except NOT_OF_THE_DISK:
        raise
    # torch's own writer raises RuntimeError where a disk is full.
    except (OSError, RuntimeError) as error:
        raise StageError(
            f"{directory} could not be written ({error}); older checkpoints are as they were. Make "
            "room on the disk, and the same command goes on from the last of them"
        ) from error


def read_manifest(directory: Path) -> Manifest:
    """RunDirError if it is no checkpoint or was cut short."""
    try:
        manifest = Manifest.model_validate_json((directory / MANIFEST).read_text())
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise RunDirError(
            f"{directory} is no whole checkpoint, its {MANIFEST} cannot be read ({error}): "
            "resume from an older one, or start the stage over"
        ) from error
    found = _sizes(directory)
    for name, size in manifest.files.items():
        if found.get(name) != size:
            raise RunDirError(
                f"{directory} was cut short: {name} has {found.get(name, 0)} of {size} bytes; "
                "restore it, resume from an older checkpoint, or start the stage over"
            )
    return manifest


def check_ranks(directory: Path, ranks: int) -> None:
    """What of `check` can be said before a learner is there. Raises RunDirError."""
    _refuse_other(directory, RANKS, read_manifest(directory).layout.ranks, ranks)


def check(directory: Path, layout: Layout) -> None:
    """Refuses a checkpoint that this learner cannot go on from.

    Raises:
        ModelError: it was made from another model, or from another policy of the same model.
        RunDirError: it is not whole, or was made by other ranks, another ZeRO stage, dtype or
            adapter.
    """
    manifest = read_manifest(directory)
    old, new = manifest.layout.model_dump(), layout.model_dump()
    settings = {
        "ranks": RANKS,
        "zero_stage": "rl.learner.zero_stage",
        "expert_parallel": "rl.learner.expert_parallel",
        "dtype": "rl.learner.dtype",
        "lora": "policy.lora",
    }
    for field, setting in settings.items():
        _refuse_other(directory, setting, old[field], new[field])
    if manifest.layout.fingerprint != layout.fingerprint:
        raise ModelError(
            f"{directory} was made from another model than the one that enters the stage now "
            f"(fingerprint {manifest.layout.fingerprint[:12]}, now {layout.fingerprint[:12]}): "
            "resume with the model that the run began with, or start the stage over"
        )


def _refuse_other(directory: Path, setting: str, old: object, new: object) -> None:
    if old != new:
        raise RunDirError(
            f"{directory} was written with {setting} = {old}, now it is {new}: DeepSpeed's "
            "checkpoints are divided accordingly; set it back, or delete "
            f"{directory.parent.parent} to start the stage over"
        )


def restore(engine: Any, directory: Path) -> Counters:
    """Called by all ranks after `check`; RunDirError if DeepSpeed cannot read its files."""
    path = directory / _rank_file(dist.get_rank())
    try:
        # Frozen weights are not in there when an adapter is trained.
        loaded, _ = engine.load_checkpoint(str(directory), tag=ENGINE_TAG, load_module_strict=False)
        state = torch.load(path, weights_only=True)
    except NOT_OF_THE_DISK:
        raise
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise RunDirError(
            f"{directory} is damaged: {error}; resume from an older checkpoint, or start the "
            "stage over"
        ) from error
    assert loaded is not None, f"DeepSpeed found nothing under {directory}"
    _set_random_states(state["random"])
    return Counters(**state["counters"])


@contextmanager
def _staged_by_first_rank(target: Path) -> Iterator[Path]:
    """The same staged directory on all ranks, which is `target` for all of them afterwards."""
    with ExitStack() as stack:
        names: list[str | None] = [None]
        if dist.get_rank() == 0:
            names = [str(stack.enter_context(staged_directory(target)))]
        dist.broadcast_object_list(names)
        assert names[0] is not None
        yield Path(names[0])
    dist.barrier()


def _sizes(directory: Path) -> dict[str, int]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(directory)): path.stat().st_size
        for path in files
        if path.name != MANIFEST
    }


def _rank_file(rank: int) -> str:
    return f"rank-{rank}.pt"


def _rank_state(counters: Counters) -> dict[str, Any]:
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)
    keys = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    states = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
        "numpy": merged(numpy_state, {"state": {"key": keys}}),
        "python": random.getstate(),
    }
    return {"counters": counters.model_dump(), "random": states}


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state_all(states["cuda"])
    keys = states["numpy"]["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state(merged(states["numpy"], {"state": {"key": keys}}))
    random.setstate(states["python"])
