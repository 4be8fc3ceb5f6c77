"""What the counts in the store say under a selection: labels, who is kept, who is undecided."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from judges.estimators import by_counts, credible_interval, pass_at_k_interval, posterior
from judges.labels import LabelSettings, label
from judges.selection import RULES, SelectionSettings, choose, drops_unsolved, easiness_of, reason
from judges.stopping import CutRule, FixedN, StoppingRule, open_prompts
from posttrain.prune.settings import PruneSettings
from posttrain.prune.store import TaskTable
from posttrain.types import Label

if TYPE_CHECKING:
    import pyarrow as pa

LABELS = tuple(Label)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """Arrays `[N]` over the tasks of a `TaskTable`, of 13 bytes a task. `value` is the metric;
    `label` is an index into `LABELS` (−1: none), `rule` one into `judges.selection.RULES`.
    `undecided`: which side of the cut a task lies on is not sure; `at_cap` of those have all
    samples that they may get."""

    value: NDArray[np.float64]
    label: NDArray[np.int8]
    kept: NDArray[np.bool_]
    rule: NDArray[np.int8]
    cuts: tuple[float | None, ...]
    undecided: NDArray[np.bool_]
    at_cap: NDArray[np.bool_]


def stopping_rule(settings: PruneSettings) -> StoppingRule:
    if not settings.judge.adaptive:
        return FixedN()
    return CutRule(settings.selection, settings.judge.labels.confidence)


def decide(tasks: TaskTable, settings: PruneSettings) -> Decisions:
    """Every task must have been judged; a million take seconds."""
    return (
        _by_rates(tasks, settings) if settings.method == "critic" else _by_scores(tasks, settings)
    )


def _by_rates(tasks: TaskTable, settings: PruneSettings) -> Decisions:
    n, c, selection = tasks.scored, tasks.correct, settings.selection
    assert n.all(), "a task without an answer has no place in a selection"
    easiness = by_counts(n, c, lambda n, c: easiness_of(*posterior(n, c), selection))
    ones = np.ones(len(tasks))
    unsolved_go = drops_unsolved(easiness, ones, selection)
    chosen = choose(easiness, (c == 0) & unsolved_go, tasks.domain, tasks.tie, selection)
    labels = by_counts(n, c, partial(_label, settings.judge.labels))
    undecided = open_prompts(stopping_rule(settings), tasks.domain, n, c)
    at_cap = n >= settings.judge.max_samples
    if not settings.judge.adaptive:
        undecided &= ~at_cap
    return Decisions(
        value=easiness,
        label=labels.astype(np.int8),
        kept=chosen.kept,
        rule=chosen.rule,
        cuts=chosen.cuts,
        undecided=undecided,
        at_cap=undecided & at_cap,
    )


def _by_scores(tasks: TaskTable, settings: PruneSettings) -> Decisions:
    assert not np.isnan(tasks.score).any(), "a task without a score has no place in a selection"
    excluded = (tasks.score > 1) & (settings.method == "ifd")
    chosen = choose(-tasks.score, excluded, tasks.domain, tasks.tie, settings.selection)
    no = np.zeros(len(tasks), dtype=bool)
    return Decisions(
        value=tasks.score,
        label=np.full(len(tasks), -1, dtype=np.int8),
        kept=chosen.kept,
        rule=chosen.rule,
        cuts=chosen.cuts,
        undecided=no,
        at_cap=no,
    )


def interval(
    n: NDArray[np.integer], c: NDArray[np.integer], selection: SelectionSettings
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ends of the metric's 95% intervals after c of n (both `[M]`); NaN for a judge that looks
    once."""
    if not selection.is_rate:
        none = np.full(len(n), np.nan)
        return none, none
    low, high = (by_counts(n, c, partial(_end, selection.k or 1, end)) for end in (0, 1))
    return low, high


@lru_cache(maxsize=1 << 16)
def _end(k: int, end: int, n: int, c: int) -> float:
    a, b = posterior(n, c)
    return (credible_interval(a, b) if k == 1 else pass_at_k_interval(a, b, k))[end]


def _label(settings: LabelSettings, n: int, c: int) -> int:
    said = label(n, c, cap=n, settings=settings)
    assert said is not None
    return LABELS.index(said)


class Reasons:
    """Why tasks were kept or dropped. Tasks with equal counts share a text."""

    def __init__(self, tasks: TaskTable, decisions: Decisions, settings: PruneSettings) -> None:
        self._tasks = tasks
        self._decisions = decisions
        self._selection = settings.selection
        self._text = lru_cache(maxsize=1 << 16)(self._describe)

    def of(self, indices: NDArray[np.integer]) -> pa.StringArray:
        """For the tasks of these indices `[M]`."""
        import pyarrow as pa

        tasks, decided = self._tasks, self._decisions
        group = tasks.domain if self._selection.by_domain else np.zeros_like(tasks.domain)
        columns = (decided.rule, decided.kept, tasks.scored, tasks.correct, group, decided.value)
        keys = np.stack([column[indices].astype(np.float64) for column in columns], axis=1)
        distinct, places = np.unique(keys, axis=0, return_inverse=True)
        texts = [self._text(*key) for key in distinct.tolist()]
        return pa.array(texts, pa.string()).take(pa.array(places.reshape(-1)))

    def _describe(
        self, rule: float, kept: float, n: float, c: float, group: float, value: float
    ) -> str:
        is_rate = self._selection.is_rate
        return reason(
            RULES[int(rule)],
            bool(kept),
            easiness=value if is_rate else -value,
            counts=f"{c:.0f} of {n:.0f} correct" if is_rate else None,
            cut=self._decisions.cuts[int(group)],
            settings=self._selection,
        )
