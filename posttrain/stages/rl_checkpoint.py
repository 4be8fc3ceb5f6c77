"""Checkpoints of the RL stage: what a later attempt needs to go on as if nothing had happened.

    rl/checkpoint-20/learner/         weights, optimizer, schedule, RNGs (posttrain.workers)
    rl/checkpoint-20/curriculum.npz   posteriors, sampler order, RNG
    rl/checkpoint-20/loop.json        step, number of draws, planned batches, draws in flight
                                      that were learned from, a teacher's lead
    rl/latest.json                    which one to resume from

What was in flight stands in the ledger. No database transaction is atomic with an optimizer step,
so the order is the contract: weights and state, then the ledger's mark, then the pointer.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.atomic import staged_directory, write_atomically
from posttrain.errors import RunDirError


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopState:
    """The driver's part of a checkpoint, as it was when `step` was recorded. `curriculum` is its
    `state_dict`: numpy arrays without objects; it has learned from the draws `learned`, which are
    in flight. `teacher_lead` is what λ rests on, where a teacher
    is weighed by how far ahead it is."""

    step: int
    num_draws: int
    plans: Sequence[Sequence[str]]
    learned: Sequence[str]
    curriculum: Mapping[str, Any]
    teacher_lead: float | None = None


BEGINNING = LoopState(step=0, num_draws=0, plans=(), learned=(), curriculum={})
"""Of a stage without a checkpoint."""


class RLCheckpoints:
    """The checkpoints in a directory, of which the newest `keep` stay."""

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory = directory
        self._keep = keep
        self._pointer = directory / "latest.json"

    async def save(
        self,
        state: LoopState,
        *,
        save_learner: Callable[[Path], Awaitable[None]],
        commit: Callable[[], None],
    ) -> None:
        """`save_learner` fills a directory, `commit` marks the step in the ledger."""
        target = self._path(state.step)
        with staged_directory(target) as staged:
            await save_learner(staged / "learner")
            # The event loop goes on feeding the engines meanwhile.
            await asyncio.to_thread(_write_state, staged, state)
        commit()
        write_atomically(self._pointer, json.dumps({"step": state.step}))
        self._remove_old(state.step)

    def latest(self) -> Path | None:
        """The checkpoint to resume from; None before the first.

        Raises:
            RunDirError: it is named but not there.
        """
        if not self._pointer.exists():
            return None
        path = self._path(json.loads(self._pointer.read_text())["step"])
        if not (path / "loop.json").exists():
            raise RunDirError(
                f"{self._pointer} names {path.name}, which is missing or cut short: restore it, or "
                "start over with --fresh"
            )
        return path

    def _path(self, step: int) -> Path:
        return self._directory / f"checkpoint-{step}"

    def _remove_old(self, newest: int) -> None:
        """Those beyond `keep`, and those of a lineage that was given up."""
        steps = {int(p.name.partition("-")[2]): p for p in self._directory.glob("checkpoint-*")}
        kept = sorted(step for step in steps if step <= newest)[-self._keep :]
        for step, path in steps.items():
            if step not in kept:
                shutil.rmtree(path)


def read_state(checkpoint: Path) -> LoopState:
    loop = json.loads((checkpoint / "loop.json").read_text())
    with np.load(checkpoint / "curriculum.npz", allow_pickle=False) as arrays:
        return LoopState(
            step=loop["step"],
            num_draws=loop["num_draws"],
            plans=loop["plans"],
            learned=loop.get("learned", []),  # checkpoints of older versions do not say
            curriculum=dict(arrays.items()),
            teacher_lead=loop["teacher_lead"],
        )


def _write_state(directory: Path, state: LoopState) -> None:
    np.savez(directory / "curriculum.npz", **state.curriculum)
    loop = {
        "step": state.step,
        "num_draws": state.num_draws,
        "plans": state.plans,
        "learned": state.learned,
        "teacher_lead": state.teacher_lead,
    }
    (directory / "loop.json").write_text(json.dumps(loop))
