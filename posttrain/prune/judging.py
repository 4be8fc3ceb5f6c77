"""The critic's answers to the tasks of a store, as long as the schedule wants more."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from judges.sampling import Answers, Sampler, unscorable
from judges.schedule import Schedule
from judges.stopping import open_prompts
from posttrain.progress import duration, say
from posttrain.prune.critic import Critic
from posttrain.prune.decisions import stopping_rule
from posttrain.prune.encoding import Encoding
from posttrain.prune.scoring import score_tasks
from posttrain.prune.settings import PruneSettings
from posttrain.prune.store import Store, TaskTable
from posttrain.types import Sampling

SAY_EVERY_S = 10.0


def open_tasks(tasks: TaskTable, settings: PruneSettings) -> NDArray[np.bool_]:
    """Tasks that need more than is there, and may get it."""
    if settings.method != "critic":
        return tasks.unjudged
    needing = open_prompts(stopping_rule(settings), tasks.domain, tasks.scored, tasks.correct)
    return needing & (tasks.scored < settings.judge.max_samples)


def num_open(tasks: TaskTable, settings: PruneSettings, asked: NDArray[np.bool_]) -> int:
    return int((open_tasks(tasks, settings) & asked).sum())


def tasks_to_ask(
    store: Store, tasks: TaskTable, settings: PruneSettings, *, top_up: bool
) -> NDArray[np.bool_]:
    """Which tasks `[N]` may be asked about where they are open. Under a selection that the answers
    were not made for, without `top_up`, these are the ones that came after the last pass; what was
    begun, raised or added to is gone on with."""
    complete_for = store.meta("complete_for") or []
    if top_up or not complete_for or settings.selection.model_dump(mode="json") in complete_for:
        return np.ones(len(tasks), dtype=bool)
    last = store.meta("last_task")
    if last is None:
        return tasks.unjudged
    # Not those alone of which nothing is known: a pass over new ones may have been interrupted.
    new: NDArray[np.bool_] = tasks.unjudged | (tasks.key > last)
    return new


def note_pass(
    store: Store, tasks: TaskTable, settings: PruneSettings, asked: NDArray[np.bool_]
) -> None:
    """After a pass over `asked`. The selection is complete if it was over all, or none is open."""
    last = store.meta("last_task") or 0
    store.set_meta("last_task", max(last, int(tasks.key.max(initial=0))))
    selection = settings.selection.model_dump(mode="json")
    complete_for = store.meta("complete_for") or []
    complete = asked.all() or not open_tasks(tasks, settings).any()
    if complete and selection not in complete_for:
        store.set_meta("complete_for", [*complete_for, selection])


async def judge(
    store: Store,
    tasks: TaskTable,
    critic: Critic,
    encoding: Encoding,
    settings: PruneSettings,
    asked: NDArray[np.bool_],
) -> dict[int, str]:
    """Every open task of `asked`, until none is; what is found is in the store at once. Returns the
    keys of tasks that were given up before they had a scored answer, and what the scorer said.

    Raises StageError if answers cannot be scored, or are no grades; what the engine raises passes
    through.
    """
    if settings.method == "critic":
        return await _sample(store, tasks, critic, encoding, settings, asked)
    await score_tasks(store, tasks, critic, encoding, settings)
    return {}


async def _sample(
    store: Store,
    tasks: TaskTable,
    critic: Critic,
    encoding: Encoding,
    settings: PruneSettings,
    may_ask: NDArray[np.bool_],
) -> dict[int, str]:
    asked = settings.judge
    sampler = Sampler(
        critic.generator,
        critic.scorer,
        encoding.prompt,
        sampling=Sampling(
            max_tokens=asked.max_tokens, temperature=asked.temperature, seed=asked.seed
        ),
        concurrency=asked.concurrency,
    )
    schedule = Schedule(
        tasks.asked,
        tasks.scored,
        tasks.correct,
        tasks.domain,
        stopping_rule(settings),
        round_size=asked.round_size if asked.adaptive else None,
        cap=asked.max_samples,
        may_ask=may_ask,
    )
    report = _Report(schedule.num_open, lambda: f"{sampler.usage.samples:,} answers")

    def keep(answers: Answers) -> None:
        store.record_answers(int(tasks.key[answers.index]), answers)
        report.tick()

    given_up = await sampler.run(
        schedule, lambda index: store.task(int(tasks.key[index])).prompt, keep
    )
    if given_up and not schedule.scored.any():
        raise unscorable("any prompt", next(iter(given_up.values())))
    return {int(tasks.key[i]): why for i, why in given_up.items() if not schedule.scored[i]}


class _Report:
    """A line now and then: how many tasks are open, and when the last may be decided."""

    def __init__(self, num_open: Callable[[], int], note: Callable[[], str]) -> None:
        self._num_open = num_open
        self._note = note
        self._began = self._said = time.monotonic()
        self._at_first = num_open()

    def tick(self) -> None:
        now = time.monotonic()
        if now - self._said < SAY_EVERY_S:
            return
        self._said = now
        left = self._num_open()
        decided = self._at_first - left
        when = duration((now - self._began) / decided * left) if decided > 0 else "?"
        say(f"prune: {left:,} prompts undecided · {self._note()} · about {when} left")
