"""How much the teacher's word counts, and how that moves: by domain, and with what it still knows.

    α_t = λ · responsibility_t
    λ   = clip(σ(slope·EMA[CE_student − CE_teacher] + offset), min_lead, 1)
    π_d ← EMA of the mean responsibility of domain d

Meta describes a distillation loss that weighs soft and hard targets dynamically through training,
and published neither formula nor ablation: this scheme is ours. It does not look at the student's
own training loss: with one label a context the student memorises, and the teacher would be lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from posttrain.losses.distillation_settings import DistillationSettings

PRIOR_BOUND = 1e-3
"""π stays this far from 0 and 1: at either end no evidence could move it any more."""


class Lead:
    """λ: how far ahead of the student the teacher still is, on labels that are not trained on and
    that the teacher can stand for."""

    def __init__(
        self,
        *,
        slope: float,
        offset: float,
        min_lead: float,
        memory: float,
        gap: float | None = None,
    ) -> None:
        """`gap` goes on from an earlier measurement."""
        self._slope = slope
        self._offset = offset
        self._min_lead = min_lead
        self._memory = memory
        self._gap = gap

    @property
    def gap(self) -> float | None:
        """EMA of CE_student − CE_teacher, nats per token; None before the first measurement."""
        return self._gap

    @property
    def weight(self) -> float:
        """λ in [min_lead, 1]; 1 before the first measurement."""
        if self._gap is None:
            return 1.0
        return min(1.0, max(self._min_lead, _sigmoid(self._slope * self._gap + self._offset)))

    def go_on_from(self, gap: float | None) -> None:
        """With an earlier one's."""
        self._gap = gap

    def observe(self, student_ce: float, teacher_ce: float) -> None:
        """Mean cross-entropies (nats per token) of the same labels."""
        gap = student_ce - teacher_ce
        if self._gap is None:
            self._gap = gap
        else:
            self._gap = self._memory * self._gap + (1 - self._memory) * gap


class Reliability:
    """π by domain: an EMA of the mean responsibility, for how many labels the teacher can stand.

    Without a margin that is online expectation-maximisation for the weight of the teacher in a
    mixture with the critic (Cappé and Moulines 2009). It sinks to little where the critic explains
    right labels almost as well and the teacher is wrong in a few: hence the margin.
    """

    def __init__(self, *, prior: float, memory: float) -> None:
        self._prior = prior
        self._memory = memory
        self._by_domain: dict[str, float] = {}

    @property
    def by_domain(self) -> Mapping[str, float]:
        return self._by_domain

    def prior(self, domain: str) -> float:
        return self._by_domain.get(domain, self._prior)

    def go_on_from(self, by_domain: Mapping[str, float]) -> None:
        """With an earlier one's."""
        self._by_domain = dict(by_domain)

    def observe(self, domain: str, mean_responsibility: float) -> None:
        moved = self._memory * self.prior(domain) + (1 - self._memory) * mean_responsibility
        self._by_domain[domain] = min(1 - PRIOR_BOUND, max(PRIOR_BOUND, moved))


def dynamic_weight(settings: DistillationSettings) -> tuple[Lead, Reliability]:
    """Both parts of the dynamic weight. Only for settings with `weight = dynamic`."""
    assert settings.slope is not None
    assert settings.offset is not None
    assert settings.min_lead is not None
    assert settings.prior is not None
    assert settings.memory is not None
    return (
        Lead(
            slope=settings.slope,
            offset=settings.offset,
            min_lead=settings.min_lead,
            memory=settings.memory,
        ),
        Reliability(prior=settings.prior, memory=settings.memory),
    )


def _sigmoid(x: float) -> float:
    # exp of the negative magnitude never overflows.
    e = math.exp(-abs(x))
    return 1 / (1 + e) if x >= 0 else e / (1 + e)
