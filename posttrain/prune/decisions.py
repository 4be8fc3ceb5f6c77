"""What the counts in the store say under a selection: labels, who is kept, who is undecided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from judges.estimators import by_counts, credible_interval, pass_at_k_interval, posterior
from judges.labels import LabelSettings, label
from judges.selection import RULES, choose, drops_unsolved, easiness_of, reason
from judges.stopping import CutRule, FixedN, StoppingRule, open_prompts
from posttrain.prune.settings import PruneSettings
from posttrain.prune.store import TaskTable
from posttrain.types import Label

LABELS = tuple(Label)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """Arrays `[N]` over the tasks of a `TaskTable`. `value` is the metric, `low` and `high` its
    95% interval (NaN for a judge that looks once); `label` is an index into `LABELS` (−1: none),
    `rule` one into `judges.selection.RULES`. `undecided`: which side of the cut a task lies on is
    not sure; `at_cap` of those have all samples that they may get."""

    value: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
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
    low, high = (by_counts(n, c, partial(_end, selection.k or 1, end)) for end in (0, 1))
    labels = by_counts(n, c, partial(_label, settings.judge.labels))
    undecided = open_prompts(stopping_rule(settings), tasks.domain, n, c)
    at_cap = n >= settings.judge.max_samples
    if not settings.judge.adaptive:
        undecided &= ~at_cap
    return Decisions(
        value=easiness,
        low=low,
        high=high,
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
    none = np.full(len(tasks), np.nan)
    no = np.zeros(len(tasks), dtype=bool)
    return Decisions(
        value=tasks.score,
        low=none,
        high=none,
        label=np.full(len(tasks), -1, dtype=np.int8),
        kept=chosen.kept,
        rule=chosen.rule,
        cuts=chosen.cuts,
        undecided=no,
        at_cap=no,
    )


def _end(k: int, end: int, n: int, c: int) -> float:
    a, b = posterior(n, c)
    return (credible_interval(a, b) if k == 1 else pass_at_k_interval(a, b, k))[end]


def _label(settings: LabelSettings, n: int, c: int) -> int:
    said = label(n, c, cap=n, settings=settings)
    assert said is not None
    return LABELS.index(said)


def reasons(
    tasks: TaskTable, decisions: Decisions, settings: PruneSettings
) -> Callable[[int], str]:
    """Why the task of an index was kept or dropped. Tasks with equal counts share the text."""
    selection = settings.selection

    @lru_cache(maxsize=1 << 16)
    def text(rule: int, kept: bool, n: int, c: int, value: float, group: int) -> str:
        return reason(
            RULES[rule],
            kept,
            easiness=value if selection.is_rate else -value,
            counts=f"{c} of {n} correct" if selection.is_rate else None,
            cut=decisions.cuts[group],
            settings=selection,
        )

    def reason_of(index: int) -> str:
        return text(
            int(decisions.rule[index]),
            bool(decisions.kept[index]),
            int(tasks.scored[index]),
            int(tasks.correct[index]),
            float(decisions.value[index]),
            int(tasks.domain[index]) if selection.by_domain else 0,
        )

    return reason_of
