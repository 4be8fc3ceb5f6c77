"""A teacher beside the rewards: it reads the answers that will be trained, and says what it would
have written.

On-policy distillation: per token log q − log π_θ joins the advantage, weighed by λ alone. How far
the teacher explains a token better than the critic (α of `posttrain.losses.distillation`) plays no
part here: the token is a sample and no verified label, and α would fall to 0 exactly where the
teacher objects.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from posttrain.advantages import AdvantageKind, group_to_samples
from posttrain.losses.teacher_weight import Lead
from posttrain.online.teacher_settings import OnlineDistillationSettings
from posttrain.teaching.records import TokenSequence
from posttrain.types import Rollout, RolloutGroup, TrainingSample

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from posttrain.types import FloatArray

    Gaps = NDArray[np.float64]

Score = Callable[[Sequence[TokenSequence]], Awaitable[Sequence["FloatArray"]]]
"""log q of each sequence's labels, nats, at the rollouts' temperature."""

QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What the teacher has to say about the groups of one step: λ (None: there is no teacher), and
    by draw the log q of each rollout's completion tokens (absent: too late)."""

    weight: float | None
    reward_weight: float
    logprobs: Mapping[str, Sequence[FloatArray]]
    metrics: Mapping[str, float]

    def samples(self, groups: Sequence[RolloutGroup], kind: AdvantageKind) -> list[TrainingSample]:
        """What the learner is given of the groups."""
        return [
            sample
            for group in groups
            for sample in group_to_samples(
                group,
                kind,
                reward_weight=self.reward_weight,
                teacher_logprobs=self.logprobs.get(group.draw_id),
            )
        ]


class GroupTeacher(Protocol):
    """What the loop needs of a teacher."""

    @property
    def reward_weight(self) -> float: ...

    @property
    def pending(self) -> Collection[asyncio.Task[Any]]:
        """What it is reading now; cancelled when the stage ends."""
        ...

    def begin(self, group: RolloutGroup, tasks: asyncio.TaskGroup) -> None:
        """The gate has admitted the group. Starts reading it and returns at once."""
        ...

    async def lesson(self, groups: Sequence[RolloutGroup]) -> Lesson:
        """About groups that were begun; waits for what is still being read."""
        ...


class NoTeacher:
    """Implements `GroupTeacher` where rewards alone are learnt from."""

    reward_weight = 1.0
    pending: Collection[asyncio.Task[Any]] = ()

    def begin(self, group: RolloutGroup, tasks: asyncio.TaskGroup) -> None:
        pass

    async def lesson(self, _: Sequence[RolloutGroup]) -> Lesson:
        return Lesson(weight=None, reward_weight=1.0, logprobs={}, metrics={})


REWARDS_ALONE = NoTeacher()


class OnlineTeacher:
    """Scores admitted groups while others are generated and trained. Owns λ.

    Consumes groups that the gate let through, never those that it rejected; produces a `Lesson` a
    step. Nobody waits for it but the step that trains the group, and that only until the group's
    deadline.
    """

    def __init__(
        self, settings: OnlineDistillationSettings, score: Score, lead: float | None = None
    ) -> None:
        """`lead` is the EMA that a checkpoint holds; None where λ starts anew or is constant."""
        self._settings = settings
        self._score = score
        self._reading: dict[str, asyncio.Task[Sequence[FloatArray] | None]] = {}
        self._lead: Lead | None = None
        if settings.weight == "dynamic":
            assert settings.slope is not None
            assert settings.offset is not None
            assert settings.min_lead is not None
            assert settings.memory is not None
            self._lead = Lead(
                slope=settings.slope,
                offset=settings.offset,
                min_lead=settings.min_lead,
                memory=settings.memory,
                gap=lead,
            )

    @property
    def reward_weight(self) -> float:
        return self._settings.reward_weight

    @property
    def pending(self) -> Collection[asyncio.Task[Any]]:
        return self._reading.values()

    def begin(self, group: RolloutGroup, tasks: asyncio.TaskGroup) -> None:
        self._reading[group.draw_id] = tasks.create_task(self._read(group))

    async def lesson(self, groups: Sequence[RolloutGroup]) -> Lesson:
        loop = asyncio.get_running_loop()
        began = loop.time()
        logprobs = {}
        for group in groups:
            heard = await self._reading.pop(group.draw_id)
            if heard is not None:
                logprobs[group.draw_id] = heard
        waited_s = loop.time() - began
        gaps = _Gaps(groups, logprobs)
        measured = {"wait_s": waited_s, "late": len(groups) - len(logprobs), **gaps.metrics()}
        right = gaps.of(correct=True)
        if self._lead is not None and right.size:
            # CE_student − CE_teacher of the same tokens is the mean of log q − log π.
            self._lead.observe(student_ce=float(right.mean()), teacher_ce=0.0)
        weight = self._weight()
        measured["weight"] = weight
        if self._lead is not None and self._lead.gap is not None:
            measured["lead"] = self._lead.gap
        return Lesson(
            weight=weight, reward_weight=self.reward_weight, logprobs=logprobs, metrics=measured
        )

    async def _read(self, group: RolloutGroup) -> Sequence[FloatArray] | None:
        """log q of each rollout's completion tokens; None past the deadline."""
        try:
            async with asyncio.timeout(self._settings.deadline_s) as deadline:
                return await self._score([_sequence(rollout) for rollout in group.rollouts])
        except TimeoutError:
            if not deadline.expired():
                raise
            return None

    def _weight(self) -> float:
        if self._lead is not None:
            return self._lead.weight
        assert self._settings.coefficient is not None
        return self._settings.coefficient


class _Gaps:
    """log q − log π_rollout of the tokens of scored answers, by what they belong to."""

    def __init__(
        self, groups: Sequence[RolloutGroup], logprobs: Mapping[str, Sequence[FloatArray]]
    ) -> None:
        self._parts: list[tuple[str, bool, Gaps]] = [
            (group.prompt.domain, reward.correct, heard - np.array(rollout.rollout_logprobs))
            for group in groups
            if group.draw_id in logprobs
            for rollout, reward, heard in zip(
                group.rollouts, group.rewards, logprobs[group.draw_id], strict=True
            )
            if reward.value is not None
        ]

    def of(self, *, correct: bool | None = None, domain: str | None = None) -> Gaps:
        chosen = [
            gaps
            for of_domain, is_correct, gaps in self._parts
            if correct in (None, is_correct) and domain in (None, of_domain)
        ]
        # NaN stands for tokens that the teacher does not know.
        return np.concatenate([np.zeros(0), *(gaps[~np.isnan(gaps)] for gaps in chosen)])

    def metrics(self) -> dict[str, float]:
        """Means and quantiles in nats per token; absent where there is no token."""
        named = {"gap": self.of(), "gap/right": self.of(correct=True)}
        named["gap/wrong"] = self.of(correct=False)
        for domain in sorted({domain for domain, _, _ in self._parts}):
            named[f"gap/{domain}"] = self.of(domain=domain)
        means = {name: float(gaps.mean()) for name, gaps in named.items() if gaps.size}
        if named["gap"].size:
            for quantile in QUANTILES:
                means[f"gap/q{quantile:g}"] = float(np.quantile(named["gap"], quantile))
        return means


def _sequence(rollout: Rollout) -> TokenSequence:
    token_ids = np.array(rollout.prompt_token_ids + rollout.completion_token_ids, dtype=np.int64)
    return TokenSequence(
        token_ids=token_ids,
        label_mask=np.arange(len(token_ids)) >= len(rollout.prompt_token_ids),
    )
