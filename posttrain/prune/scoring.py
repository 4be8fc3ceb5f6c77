"""Grades and IFD of the tasks of a store, from the critic's log-probabilities of given tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import numpy as np

from judges.grade import GRADES, MIN_MASS, read_grade
from judges.ifd import ifd
from posttrain.errors import StageError
from posttrain.progress import Progress
from posttrain.prune.critic import Critic
from posttrain.prune.encoding import Encoding
from posttrain.prune.settings import PruneSettings
from posttrain.prune.store import Store, TaskTable

FIRST_GRADES = 32
"""After so many it is known whether the critic follows the rubric."""


async def score_tasks(
    store: Store, tasks: TaskTable, critic: Critic, encoding: Encoding, settings: PruneSettings
) -> None:
    """Every task that has no score gets one, in the store at once.

    Raises StageError for a critic that does not answer with grades; what the engine raises passes
    through.
    """
    keys = tasks.key[tasks.unjudged].tolist()
    waiting = iter(keys)
    progress = Progress(f"prune: {settings.method}", len(keys))
    masses: list[float] = []

    async def work() -> None:
        for key in waiting:
            task = store.task(key)
            sequences = encoding.sequences(task)
            logprobs = await critic.score_tokens(sequences, f"{settings.method}-{task.task_id}")
            if settings.method == "ifd":
                score, parts = _ifd(logprobs)
            else:
                score, parts = _grade(logprobs)
                _check_mass(masses, parts["mass"])
            tokens = sum(map(len, sequences))
            store.record_score(key, score, tokens, parts)
            progress.advance()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(settings.judge.concurrency):
                group.create_task(work())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


def _ifd(logprobs: Sequence[Sequence[float]]) -> tuple[float, dict[str, Any]]:
    whole, alone = logprobs
    conditioned = whole[-len(alone) :]
    return ifd(conditioned, alone), {
        "nll_with_prompt": -fmean(conditioned),
        "nll_alone": -fmean(alone),
        "answer_tokens": len(alone) + 1,
    }


def _grade(logprobs: Sequence[Sequence[float]]) -> tuple[float, dict[str, Any]]:
    last = [sequence[-1] for sequence in logprobs]
    grade = read_grade(last)
    shares = dict(zip(GRADES, np.exp(last).tolist(), strict=True))
    return grade.value, {**asdict(grade), "probabilities": shares}


def check_grades(store: Store) -> None:
    """Raises StageError if what is stored are no grades, however few there are and whenever they
    came: they would be selected by, and are noise."""
    mean = store.mean_part("mass")
    if mean is not None:
        _check_mean(mean, "all prompts")


def _check_mass(masses: list[float], mass: float) -> None:
    masses.append(mass)
    if len(masses) == FIRST_GRADES:
        _check_mean(fmean(masses), "the first prompts")


def _check_mean(mass: float, of_what: str) -> None:
    if mass < MIN_MASS:
        raise StageError(
            f"the critic gives the grades 1 to 5 together a probability of {mass:.3f} only (mean of"
            f" {of_what}): it does not follow the rubric. Take a critic that does, or another"
            " method"
        )
