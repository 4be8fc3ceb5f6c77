"""When a prompt needs no more samples: after n, when its label is decided, or when it is known on
which side of the cut it lies.

A rule sees counts only, c of n answers correct, so prompts with equal counts share its answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from judges.estimators import beta_cdf, distinct, posterior, rate_at
from judges.labels import LabelSettings, confident_label
from judges.selection import SelectionSettings, drops_unsolved, easiness_of, quantile_count

CUT, LABEL = 1, 2
"""What a prompt is judged for; `CUT | LABEL` is both."""
PURPOSES = 4


class Cell(NamedTuple):
    """All prompts of a domain of which c of n answers were correct."""

    domain: int
    n: int
    c: int


Population = Mapping[Cell, int]
"""How many prompts are in each cell."""


def cells_of(
    domain: NDArray[np.integer], n: NDArray[np.integer], c: NDArray[np.integer]
) -> tuple[list[Cell], NDArray[np.intp]]:
    """The cells that are not empty, and for each prompt `[N]` the index of its own."""
    base = int(n.max(initial=0)) + 1
    codes, places = distinct((domain.astype(np.int64) * base + n) * base + c)
    cells = [Cell(code // base**2, code // base % base, code % base) for code in codes.tolist()]
    return cells, places


def open_prompts(
    rule: StoppingRule,
    domain: NDArray[np.integer],
    n: NDArray[np.integer],
    c: NDArray[np.integer],
) -> NDArray[np.bool_]:
    """Which prompts `[N]` need more samples by the rule, whatever the cap."""
    cells, places = cells_of(domain, n, c)
    counts = np.bincount(places, minlength=len(cells))
    rule.follow(dict(zip(cells, counts.tolist(), strict=True)))
    return np.array([rule.is_open(cell) for cell in cells], dtype=bool)[places]


class StoppingRule(Protocol):
    """`is_open` says whether prompts with fewer samples than the cap need more. `breadth_first`
    rules want all prompts at few samples before any gets many, because the cut moves with them."""

    breadth_first: bool

    def is_open(self, cell: Cell) -> bool: ...

    def follow(self, population: Population) -> None:
        """Take note of where all prompts stand now."""
        ...


class FixedN:
    """Every prompt gets as many samples as the cap says: what an unbiased pass@k needs."""

    breadth_first = False

    def is_open(self, cell: Cell) -> bool:  # noqa: ARG002
        return True

    def follow(self, population: Population) -> None:
        pass


class LabelRule:
    """Until the label is decided with confidence."""

    breadth_first = False

    def __init__(self, labels: LabelSettings) -> None:
        self._labels = labels

    def is_open(self, cell: Cell) -> bool:
        return confident_label(cell.n, cell.c, self._labels) is None

    def follow(self, population: Population) -> None:
        pass


class CutRule:
    """Until a prompt lies on one side of the selection's cut with `confidence`.

    A threshold stays where it is; the cut of a quantile is estimated from all prompts and moves.
    A prompt without a success is asked up to the cap where the selection drops the unsolved.
    """

    def __init__(self, selection: SelectionSettings, confidence: float) -> None:
        self.breadth_first = selection.drop_easiest is not None
        self._selection = selection
        self._confidence = confidence
        self._rates: dict[int, float] = {}
        self._unsolved_go = selection.drop_unsolved is True

    def is_open(self, cell: Cell) -> bool:
        if cell.n == 0 or (cell.c == 0 and self._unsolved_go):
            return True
        rate = self._rates.get(cell.domain if self._selection.by_domain else 0)
        if rate is None:  # nothing to compare with
            return False
        above = 1.0 - beta_cdf(rate, *posterior(cell.n, cell.c))
        return 1.0 - self._confidence < above < self._confidence

    def follow(self, population: Population) -> None:
        sampled = [(cell, count) for cell, count in population.items() if cell.n and count]
        values = np.array([self._easiness(cell) for cell, _ in sampled])
        weights = np.array([count for _, count in sampled], dtype=np.float64)
        self._unsolved_go = drops_unsolved(values, weights, self._selection)
        k = self._selection.k or 1
        if self._selection.easy_above is not None:
            self._rates = {0: rate_at(self._selection.easy_above, k)}
            return
        share = self._selection.drop_easiest
        assert share is not None
        ranks = np.array([not (self._unsolved_go and cell.c == 0) for cell, _ in sampled], bool)
        group = np.array([cell.domain if self._selection.by_domain else 0 for cell, _ in sampled])
        self._rates = {
            int(code): rate_at(weighted_cut(values[mask], weights[mask], share), k)
            for code in np.unique(group[ranks])
            for mask in [ranks & (group == code)]
        }

    def _easiness(self, cell: Cell) -> float:
        return easiness_of(*posterior(cell.n, cell.c), self._selection)


class PurposeRule:
    """Prompts that are judged for a cut go by the one rule, those for a label by the other, those
    for both until neither wants more. Their domains are those of `with_purpose`."""

    def __init__(self, cut: CutRule, labels: LabelRule) -> None:
        self.breadth_first = cut.breadth_first
        self._cut = cut
        self._labels = labels

    def is_open(self, cell: Cell) -> bool:
        purpose, cell = _purpose_of(cell)
        of_cut = bool(purpose & CUT) and self._cut.is_open(cell)
        return of_cut or (bool(purpose & LABEL) and self._labels.is_open(cell))

    def follow(self, population: Population) -> None:
        """The cut is made among the prompts that it is for."""
        selected: Counter[Cell] = Counter()
        for cell, count in population.items():
            purpose, plain = _purpose_of(cell)
            if purpose & CUT:
                selected[plain] += count
        self._cut.follow(selected)


def with_purpose(domain: NDArray[np.integer], purpose: NDArray[np.integer]) -> NDArray[np.integer]:
    """Codes for both: prompts with equal counts are told apart by what they are judged for."""
    return domain * PURPOSES + purpose


def _purpose_of(cell: Cell) -> tuple[int, Cell]:
    domain, purpose = divmod(cell.domain, PURPOSES)
    return purpose, cell._replace(domain=domain)


def weighted_cut(easiness: NDArray[np.float64], weight: NDArray[np.float64], share: float) -> float:
    """Where the easiest `share` ends: halfway between the hardest dropped and the easiest kept of
    prompts that occur `weight` times (both `[K]`, K ≥ 1)."""
    order = np.argsort(-easiness)
    values, reached = easiness[order], np.cumsum(weight[order])
    count = quantile_count(share, int(reached[-1]))
    kept = int(np.searchsorted(reached, count, side="right"))
    dropped = int(np.searchsorted(reached, count, side="left")) if count else kept
    return float(values[kept] + values[dropped]) / 2.0
