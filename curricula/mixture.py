"""Which domains a batch holds, so that what is trained keeps the quotas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from posttrain.errors import SettingsError


def largest_remainder(
    weights: Sequence[float], total: int, owed: Sequence[float] | None = None
) -> list[int]:
    """Splits `total` seats by weight (Hamilton's method): each gets the whole part of its quota
    `total·w/Σw`, the seats left over go to the largest remainders, earlier ones first on ties.

    `owed` is added to the remainders, one entry a weight: what earlier splits fell short.

    >>> largest_remainder([0.5, 0.3, 0.2], 4)
    [2, 1, 1]
    """
    quotas = np.asarray(weights, np.float64) / np.sum(weights) * total
    seats = np.floor(quotas)
    claims = quotas - seats + (0.0 if owed is None else np.asarray(owed))
    left_over = total - int(seats.sum())
    seats[np.argsort(-claims, kind="stable")[:left_over]] += 1
    return [int(n) for n in seats]


def check_quotas(quotas: Mapping[str, float], sizes: Mapping[str, int]) -> None:
    """Raises SettingsError unless the quotas name exactly the domains that have prompts and leave
    something to draw."""
    known = ", ".join(sorted(sizes))
    for name in quotas.keys() - sizes.keys():
        raise SettingsError(
            f"quotas name domain {name!r}, which has no prompts; there are: {known}"
        )
    missing = sorted(sizes.keys() - quotas.keys())
    if missing:
        raise SettingsError(
            f"quotas say nothing about {', '.join(missing)}: add a share, 0 to leave a domain out"
        )
    if sum(quotas.values()) <= 0:
        raise SettingsError(f"quotas sum to nothing: {dict(quotas)}; give a domain a share above 0")


_MEMORY = 0.95  # of a domain's share of trainable groups, per group
_MOST_EFFORT = 4.0
_PATIENCE = 16


class DomainMixture:
    """Names the domains of a batch. Quotas are shares of what is *trained*: whoever draws for a
    seat draws until a group of its domain carries a signal.

    A domain whose groups can be trained less than a `_MOST_EFFORT`th as often as the best one's
    gets accordingly less than its quota, else a hopeless domain would take all the effort. For the
    same reason `_PATIENCE` draws in a row that end untrained let a seat pass to another domain; it
    is not owed back. `fixed` quotas are kept whatever that costs.

    Every batch is within one of the shares as they are then. What rounding denies a domain in one
    batch it is owed in the next, so a share below one group a batch is met over time.
    Deterministic.
    """

    def __init__(
        self, weights: Mapping[str, float], batch_size: int, *, fixed: bool = False
    ) -> None:
        self._names = tuple(name for name in sorted(weights) if weights[name] > 0)
        assert self._names, weights
        self._weights = np.array([weights[name] for name in self._names])
        self._batch_size = batch_size
        self._fixed = fixed
        self._owed = np.zeros(len(self._names))
        self._trainable = np.ones(len(self._names))
        self._fruitless = np.zeros(len(self._names), np.int64)

    def next_batch(self) -> list[str]:
        """Each domain's seats are spread evenly, so that a part of the batch is mixed too."""
        shares = list(self.shares().values())
        counts = largest_remainder(shares, self._batch_size, self._owed.tolist())
        self._owed += np.array(shares) * self._batch_size - counts
        places = [((i + 0.5) / n, d) for d, n in enumerate(counts) for i in range(n)]
        return [self._names[d] for _, d in sorted(places)]

    def instead_of(self, domain: str) -> str:
        """Whose prompt a seat of `domain` gets next: its own, unless the patience with it is over;
        then that of the most often trainable domain with which it is not."""
        hopeful = self._fruitless < _PATIENCE
        if self._fixed or hopeful[self._names.index(domain)] or not hopeful.any():
            return domain
        return self._names[int(np.where(hopeful, self._trainable, -1.0).argmax())]

    def observe(self, domain: str, *, trainable: bool) -> None:
        """Learns whether a draw from a domain came to be trainable."""
        index = self._names.index(domain)
        self._trainable[index] += (1.0 - _MEMORY) * (trainable - self._trainable[index])
        self._fruitless[index] = 0 if trainable else self._fruitless[index] + 1

    def shares(self) -> dict[str, float]:
        """Of the trained groups, by domain."""
        weights = self._weights
        if not self._fixed:
            best = max(float(self._trainable.max()), 1e-3)  # none may have been trainable for long
            weights = weights * np.minimum(1.0, self._trainable * _MOST_EFFORT / best)
        return dict(zip(self._names, (weights / weights.sum()).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {
            "mixture_trainable": self._trainable.copy(),
            "mixture_owed": self._owed.copy(),
            "mixture_fruitless": self._fruitless.copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._trainable = np.array(state["mixture_trainable"], np.float64)
        self._owed = np.array(state["mixture_owed"], np.float64)
        self._fruitless = np.array(state["mixture_fruitless"], np.int64)
