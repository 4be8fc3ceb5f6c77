"""What ranks of SFT and `posttrain teach` have in common: models that are asked, if at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from posttrain.losses.distillation_settings import DistillationSettings
from posttrain.teaching.acquire import AcquireReport, Ask, acquire
from posttrain.teaching.identity import Teaching
from posttrain.teaching.records import Record, TokenSequence
from posttrain.teaching.store import TargetStore
from posttrain.workers.settings import TeacherPoolSettings
from posttrain.workers.teacher_pool import TeacherPool


@dataclass(frozen=True, slots=True, kw_only=True)
class Teachers:
    """Who can be asked, and where the actors run that answer. Plain values that travel to other
    processes; `deadline_s` is for a pool's start."""

    teaching: Teaching
    pool: TeacherPoolSettings
    deadline_s: float

    def acquire_targets(
        self, sequences: Sequence[TokenSequence], store: TargetStore
    ) -> AcquireReport:
        """The teacher's targets of all sequences; it is started only for those that are missing."""

        @contextmanager
        def open_teacher() -> Iterator[Ask]:
            with self._asked(self.teaching.teacher) as pool:
                yield lambda asked: pool.targets(asked, self.teaching.targets)

        return acquire(sequences, store, open_teacher, "teacher")

    def acquire_critic(
        self, sequences: Sequence[TokenSequence], store: TargetStore
    ) -> AcquireReport:
        """log p₀ of all sequences' labels, likewise."""

        @contextmanager
        def open_critic() -> Iterator[Ask]:
            with self._asked(self.teaching.critic) as pool:
                yield lambda asked: [
                    Record(per_label={"label_logprobs": logprobs})
                    for logprobs in pool.label_logprobs(asked, 1.0)
                ]

        return acquire(sequences, store, open_critic, "critic")

    @contextmanager
    def _asked(self, model: str) -> Iterator[TeacherPool]:
        pool = TeacherPool(model, self.pool, self.deadline_s)
        try:
            yield pool
        finally:
            pool.stop()


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationJob:
    """What a rank needs to distil: how targets are weighed, and where they come from (None: from
    nowhere, cross-entropy alone)."""

    settings: DistillationSettings
    teachers: Teachers | None
