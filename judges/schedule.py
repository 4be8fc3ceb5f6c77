"""Which prompt is asked next, and for how many answers, so that an engine never runs dry."""

from __future__ import annotations

import heapq
from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from judges.stopping import Cell, StoppingRule, cells_of

REFRESHES = 100
"""Times that the cut is estimated anew while as many requests return as there are prompts."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Prompt `index` is to give `size` answers; `asked` before these, unscored ones included."""

    index: int
    size: int
    asked: int


class Schedule:
    """Hands out prompts that are not decided, each to one request at a time.

    Arrays `[N]` of 4 bytes a prompt: a set of millions fits. Prompts with equal counts wait in one
    queue, so that the next is found without looking at the others.

    Args:
        asked: answers each prompt was asked for before, `scored` of them, `correct` of those.
        domain: codes from 0.
        round_size: answers a request, at most; None: all up to the cap at once.
        cap: scored answers after which a prompt is never asked again.
        may_ask: which prompts may be asked; all by default. The others count for the rule only.
    """

    def __init__(
        self,
        asked: NDArray[np.integer],
        scored: NDArray[np.integer],
        correct: NDArray[np.integer],
        domain: NDArray[np.integer],
        rule: StoppingRule,
        *,
        round_size: int | None,
        cap: int,
        may_ask: NDArray[np.bool_] | None = None,
    ) -> None:
        self.asked = asked.astype(np.int32)
        self.scored = scored.astype(np.int32)
        self.correct = correct.astype(np.int32)
        self._domain = domain.astype(np.int64)
        self._rule = rule
        self._round_size = round_size or cap
        self._cap = cap
        self._idle: dict[Cell, array[int]] = {}
        self._population: dict[Cell, int] = {}
        self._queue: list[tuple[int, Cell]] = []
        self._since_refresh = 0
        self._refresh_every = max(16, len(asked) // REFRESHES)
        self._fill(np.ones(len(asked), dtype=bool) if may_ask is None else may_ask)
        self._refresh()

    def next(self) -> Ask | None:
        """The next request; None if nothing is to be asked before `record` says more."""
        while True:
            while self._queue:
                cell = self._queue[0][1]
                if self._idle[cell]:
                    index = self._idle[cell].pop()
                    size = min(self._round_size, self._cap - cell.n)
                    return Ask(index, size, int(self.asked[index]))
                heapq.heappop(self._queue)
            if not self._since_refresh:
                return None
            self._refresh()

    def record(
        self, index: int, *, asked: int, scored: int, correct: int, again: bool = True
    ) -> None:
        """What came of a request: `scored` of `asked` answers, `correct` of them right. The prompt
        may be asked `again`, or is given up."""
        self._population[self._cell(index)] -= 1
        self.asked[index] += asked
        self.scored[index] += scored
        self.correct[index] += correct
        cell = self._cell(index)
        self._population[cell] = self._population.get(cell, 0) + 1
        waiting = self._idle.setdefault(cell, array("i"))
        if again:
            waiting.append(index)
        self._since_refresh += 1
        if self._since_refresh >= self._refresh_every:
            self._refresh()
        elif again and len(waiting) == 1:
            self._enqueue(cell)

    def is_open(self, index: int) -> bool:
        """Whether the prompt needs more samples as things stand."""
        cell = self._cell(index)
        return cell.n < self._cap and self._rule.is_open(cell)

    def num_open(self) -> int:
        """Prompts that need more samples as things stand, those under way left out."""
        self._refresh()
        return sum(len(self._idle[cell]) for _, cell in self._queue)

    def _cell(self, index: int) -> Cell:
        return Cell(int(self._domain[index]), int(self.scored[index]), int(self.correct[index]))

    def _fill(self, may_ask: NDArray[np.bool_]) -> None:
        if not len(self.scored):
            return
        cells, places = cells_of(self._domain, self.scored, self.correct)
        order = np.argsort(places, kind="stable")[::-1]  # the first prompt is taken first
        counts = np.bincount(places)
        for cell, members in zip(
            reversed(cells), np.split(order, np.cumsum(counts[::-1])[:-1]), strict=True
        ):
            waiting = members[may_ask[members]]
            self._idle[cell] = array("i", waiting.astype(np.int32).tobytes())
            self._population[cell] = len(members)

    def _refresh(self) -> None:
        self._since_refresh = 0
        self._rule.follow(self._population)
        self._queue.clear()
        for cell, waiting in self._idle.items():
            if waiting:
                self._enqueue(cell)

    def _enqueue(self, cell: Cell) -> None:
        if cell.n < self._cap and self._rule.is_open(cell):
            # Deepest first, a prompt once begun is soon decided and its verdict on disk.
            heapq.heappush(self._queue, (cell.n if self._rule.breadth_first else -cell.n, cell))
