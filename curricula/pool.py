"""All prompts sorted by domain, then difficulty bucket, kept sorted as prompts move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curricula.buckets import BUCKETS

DROPPED = len(BUCKETS)
"""The cell after the buckets of a domain: prompts that re-screening took out, to be re-tested."""

_CELLS = len(BUCKETS) + 1


class BucketedPool:
    """One array of prompt numbers `[N]`, a contiguous cell for each (domain, bucket) and for the
    dropped ones of each domain.

    A prompt moves to a neighbouring cell by a swap with the last of its own and a shift of one
    boundary, so a move costs at most six swaps and nothing is ever allocated: 8 bytes a prompt.
    """

    def __init__(
        self, domain: NDArray[np.int16], bucket: NDArray[np.integer], num_domains: int
    ) -> None:
        cell = domain.astype(np.int32) * _CELLS + bucket.astype(np.int32)
        counts = np.bincount(cell, minlength=num_domains * _CELLS)
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._order = np.argsort(cell, kind="stable").astype(np.int32)
        self._position = _inverse(self._order)

    def counts(self, domain: int) -> NDArray[np.int64]:
        """Prompts in each bucket of a domain, `[len(BUCKETS)]`."""
        first = domain * _CELLS
        starts = self._starts[first : first + len(BUCKETS) + 1]
        counts: NDArray[np.int64] = starts[1:] - starts[:-1]
        return counts

    def num_dropped(self, domain: int) -> int:
        first = domain * _CELLS + DROPPED
        return int(self._starts[first + 1] - self._starts[first])

    def is_dropped(self, index: int) -> bool:
        return self._cell_of(index) % _CELLS == DROPPED

    def pick(
        self, domain: int, buckets: NDArray[np.int64], fractions: NDArray[np.float64]
    ) -> NDArray[np.int32]:
        """The prompt that stands at `fractions[i]` in [0, 1) of the way through `buckets[i]`, which
        may be `DROPPED`; none of them may be empty."""
        cells = domain * _CELLS + buckets
        starts = self._starts[cells]
        offsets = fractions * (self._starts[cells + 1] - starts)
        picked: NDArray[np.int32] = self._order[starts + offsets.astype(np.int64)]
        return picked

    def move(self, index: int, bucket: int) -> None:
        """Puts a prompt into a bucket of its own domain, or to the `DROPPED` ones."""
        cell = self._cell_of(index)
        target = cell // _CELLS * _CELLS + bucket
        while cell < target:
            cell += 1
            self._starts[cell] -= 1
            self._swap(index, self._starts[cell])
        while cell > target:
            self._swap(index, self._starts[cell])
            self._starts[cell] += 1
            cell -= 1

    def state_dict(self) -> dict[str, Any]:
        return {"pool_order": self._order.copy(), "pool_starts": self._starts.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._order = np.array(state["pool_order"], np.int32)
        self._starts = np.array(state["pool_starts"], np.int64)
        self._position = _inverse(self._order)

    def _cell_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, self._position[index], side="right")) - 1

    def _swap(self, index: int, place: np.int64) -> None:
        other, old_place = self._order[place], self._position[index]
        self._order[old_place], self._order[place] = other, index
        self._position[other], self._position[index] = old_place, place


def _inverse(order: NDArray[np.int32]) -> NDArray[np.int32]:
    position = np.empty_like(order)
    position[order] = np.arange(len(order), dtype=np.int32)
    return position
