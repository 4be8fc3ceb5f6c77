"""What ranks of SFT and `posttrain teach` have in common: models that are asked, if at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from posttrain.losses.distillation_settings import DistillationSettings
from posttrain.teaching.acquire import AcquireReport, Ask, acquire
from posttrain.teaching.identity import Teaching
from posttrain.teaching.records import Record, TokenSequence
from posttrain.teaching.settings import TargetSettings
from posttrain.teaching.store import TargetStore
from posttrain.workers.settings import TeacherPoolSettings
from posttrain.workers.teacher_pool import TeacherPool

if TYPE_CHECKING:
    from posttrain.types import FloatArray


class Model(Protocol):
    """See `CausalTeacher`."""

    def targets(
        self, sequences: Sequence[TokenSequence], settings: TargetSettings
    ) -> list[Record]: ...

    def label_logprobs(
        self, sequences: Sequence[TokenSequence], temperature: float
    ) -> list[FloatArray]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Teachers:
    """Who can be asked, and where the actors run that answer. Plain values that travel to other
    processes; `deadline_s` is for a pool's start."""

    teaching: Teaching
    pool: TeacherPoolSettings
    deadline_s: float

    def acquire(
        self,
        sequences: Sequence[TokenSequence],
        targets: TargetStore,
        critic: TargetStore | None = None,
    ) -> dict[str, AcquireReport]:
        """Afterwards the teacher's targets of all sequences are stored, and with a store for the
        critic log p₀ of their labels; reports by `targets` and `critic`. A model is loaded only for
        what is missing, the critic where the teacher was: a process takes longer to start."""
        with self._models() as load:

            def load_teacher() -> Ask:
                teacher = load(self.teaching.teacher)
                return lambda asked: teacher.targets(asked, self.teaching.targets)

            def load_critic() -> Ask:
                policy = load(self.teaching.critic)
                return lambda asked: [
                    Record(per_label={"label_logprobs": logprobs})
                    for logprobs in policy.label_logprobs(asked, 1.0)
                ]

            reports = {"targets": acquire(sequences, targets, load_teacher, "teacher")}
            if critic is not None:
                reports["critic"] = acquire(sequences, critic, load_critic, "critic")
        return reports

    @contextmanager
    def _models(self) -> Iterator[Callable[[str], Model]]:
        """Loads a checkpoint in the place of the one before; nothing runs until the first."""
        pool: TeacherPool | None = None

        def load(checkpoint: str) -> Model:
            nonlocal pool
            if pool is None:
                pool = TeacherPool(checkpoint, self.pool, self.deadline_s)
            else:
                pool.load(checkpoint)
            return pool

        try:
            yield load
        finally:
            if pool is not None:
                pool.stop()


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationJob:
    """What a rank needs to distil: how targets are weighed, and where they come from (None: from
    nowhere, cross-entropy alone)."""

    settings: DistillationSettings
    teachers: Teachers | None
