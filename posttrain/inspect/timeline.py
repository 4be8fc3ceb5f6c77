"""The life of one prompt, line by line: what the ledger tells, and what was answered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from posttrain.advantages import ADVANTAGES
from posttrain.audit import Decided, Ended, Event, prompt_history
from posttrain.inspect.file_frames import answer_files, check_answers, read_prompts, scan_answers
from posttrain.run_dir import RunDir
from posttrain.types import Action, DrawOutcome, PolicyVersion

Answers = Mapping[tuple[str, int], list[dict[str, Any]]]
"""(draw, attempt) -> rows of the rollout log."""


def timeline(run: RunDir, prompt_id: str, *, texts: bool) -> list[str]:
    """Everything that happened to a prompt, in order; empty if the run never judged or drew it.

    Under the end of each draw stand its answers, and if it was trained their advantages, as far as
    they are on disk. `texts` adds what was asked and what was answered.

    Raises RunDirError where there is no ledger, DataError for files that cannot be read.
    """
    events = prompt_history(run.ledger_path, prompt_id)
    if not events:
        return []
    advantage = run.config()["settings"].get("rl", {}).get("advantage", "mean")
    answers = _answers(run, prompt_id)
    return [*_about(run, prompt_id, texts), *tell(events, answers, advantage, texts=texts)]


def tell(
    events: Sequence[Event], answers: Answers, advantage: str, *, texts: bool
) -> Iterator[str]:
    """`advantage` is the run's `rl.advantage`, by which the answers were trained."""
    out_of_pool = False
    for event in events:
        line = event.describe()
        if isinstance(event, Decided) and event.stage == "rl" and event.void_by is None:
            drops = event.action is Action.DROP
            if drops != out_of_pool:
                line += "; it leaves the pool" if drops else "; it is back in the pool"
            elif drops:
                line += "; it stays out of the pool"
            out_of_pool = drops
        yield line
        if isinstance(event, Ended):
            rows = answers.get((event.draw_id, event.attempt), [])
            if rows:
                yield from _about_answers(event, rows, advantage, texts)


def _about_answers(
    event: Ended, rows: Sequence[Mapping[str, Any]], advantage: str, texts: bool
) -> Iterator[str]:
    oldest = min(PolicyVersion.parse(row["oldest_version"]) for row in rows)
    newest = max(PolicyVersion.parse(row["newest_version"]) for row in rows)
    written = f"version {oldest}" if oldest == newest else f"versions {oldest} to {newest}"
    found = " ".join(row["reward_outcome"] for row in rows)
    yield f"    answered by {written}: {found}"
    gains: list[float | None] = [None] * len(rows)
    if event.outcome is DrawOutcome.TRAINED:
        gains = _advantages([row["reward"] for row in rows], advantage)
        shown = " ".join("–" if gain is None else f"{gain:+.3f}" for gain in gains)
        lag = "" if event.step is None else f", lag {event.step - 1 - oldest.step}"
        yield f"    trained with advantages {shown}{lag}"
    for row, gain in zip(rows, gains, strict=True) if texts else ():
        reward = "unscored" if row["reward"] is None else f"reward {row['reward']:.3f}"
        weight = "" if gain is None else f", advantage {gain:+.3f}"
        yield f"      {row['reward_outcome']}, {reward}{weight}: {row['text']!r}"


def _advantages(rewards: Sequence[float | None], kind: str) -> list[float | None]:
    """As the group was trained: unscored answers leave the baseline and have none."""
    scored = np.array([reward for reward in rewards if reward is not None], np.float64)
    found = iter(ADVANTAGES[kind](scored).tolist())  # type: ignore[index]
    return [None if reward is None else next(found) for reward in rewards]


def _answers(run: RunDir, prompt_id: str) -> Answers:
    files = [check_answers(file) for file in answer_files(run.rollouts_dir)]
    rows = scan_answers(files).filter(pl.col("prompt_id") == prompt_id).collect()
    by_draw: defaultdict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows.iter_rows(named=True):
        by_draw[row["draw_id"], row["attempt"]].append(row)
    return by_draw


def _about(run: RunDir, prompt_id: str, texts: bool) -> Iterator[str]:
    for row in read_prompts(run.prompts_path).filter(pl.col("prompt_id") == prompt_id).to_dicts():
        yield f"prompt {prompt_id}, {row['domain']}"
        if texts:
            yield from (f"    {line}" for line in row["text"].split("\n"))
            yield f"    reference: {row['reference']}"
