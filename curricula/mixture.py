"""Which domain draws next, so that what is trained keeps the quotas."""

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


_MEMORY = 0.95  # of a domain's share of groups with a signal, per group
_MOST_BOOST = 4.0


class DomainMixture:
    """Names a domain per call. Quotas are shares of what is *trained*: a domain whose groups carry
    a signal half as often as the best one's is drawn twice as often, at most `_MOST_BOOST` times
    (else a hopeless domain would take every slot).

    Every batch of `batch_size` calls is within one of the shares as they are then. What rounding
    denies a domain in one batch it is owed in the next, so a share below one draw a batch is met
    over time. Deterministic.
    """

    def __init__(self, weights: Mapping[str, float], batch_size: int) -> None:
        self._names = tuple(name for name in sorted(weights) if weights[name] > 0)
        assert self._names, weights
        self._weights = np.array([weights[name] for name in self._names])
        self._batch_size = batch_size
        self._owed = np.zeros(len(self._names))
        self._trainable = np.ones(len(self._names))
        self._schedule = np.empty(0, np.int16)
        self._next = 0

    def next(self) -> str:
        if self._next == len(self._schedule):
            self._plan_batch()
        domain = int(self._schedule[self._next])
        self._next += 1
        return self._names[domain]

    def observe(self, domain: str, *, trainable: bool) -> None:
        """Learns whether a group of a domain that is drawn from carried a signal."""
        index = self._names.index(domain)
        self._trainable[index] += (1.0 - _MEMORY) * (trainable - self._trainable[index])

    def shares(self) -> dict[str, float]:
        """Of the draws, by domain."""
        best = max(float(self._trainable.max()), 1e-3)  # no domain may have had a signal for long
        with_signal = np.maximum(self._trainable, best / _MOST_BOOST)
        weights = self._weights / with_signal
        return dict(zip(self._names, (weights / weights.sum()).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {
            "mixture_trainable": self._trainable.copy(),
            "mixture_owed": self._owed.copy(),
            "mixture_schedule": self._schedule.copy(),
            "mixture_next": np.array(self._next),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._trainable = np.array(state["mixture_trainable"], np.float64)
        self._owed = np.array(state["mixture_owed"], np.float64)
        self._schedule = np.array(state["mixture_schedule"], np.int16)
        self._next = int(state["mixture_next"])

    def _plan_batch(self) -> None:
        shares = list(self.shares().values())
        counts = largest_remainder(shares, self._batch_size, self._owed.tolist())
        self._owed += np.array(shares) * self._batch_size - counts
        # Each domain's draws are spread evenly over the batch, so that a part of it is mixed too.
        places = [((i + 0.5) / n, d) for d, n in enumerate(counts) for i in range(n)]
        self._schedule = np.array([d for _, d in sorted(places)], np.int16)
        self._next = 0
