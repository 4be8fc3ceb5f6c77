"""Who teaches, as the ranks of SFT and `posttrain teach` need it: stores, and models to ask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from posttrain.teaching.acquire import (
    AcquireReport,
    Ask,
    acquire,
    critic_dir,
    critic_identity,
    targets_dir,
    targets_identity,
)
from posttrain.teaching.records import Record, TokenSequence
from posttrain.teaching.settings import TargetSettings
from posttrain.teaching.store import Identity, TargetStore, check_identity
from posttrain.workers.settings import TeacherPoolSettings
from posttrain.workers.teacher_pool import TeacherPool


@dataclass(frozen=True, slots=True, kw_only=True)
class Teaching:
    """A teacher and the frozen critic beside it, with what their word is stored under. Plain values
    that travel to other processes; `deadline_s` is for a pool's start."""

    teacher: str
    teacher_fingerprint: str
    critic: str
    critic_fingerprint: str
    tokenizer: str
    template: str
    targets: TargetSettings
    store: Path
    pool: TeacherPoolSettings
    deadline_s: float

    @property
    def targets_identity(self) -> Identity:
        return targets_identity(
            self.teacher_fingerprint, self.tokenizer, self.template, self.targets
        )

    def check_store(self) -> None:
        """Raises StoreError if the store was made with something else."""
        check_identity(targets_dir(self.store), self.targets_identity)

    def open_targets(self) -> TargetStore:
        return TargetStore(targets_dir(self.store), self.targets_identity)

    def open_critic(self) -> TargetStore:
        return TargetStore(
            critic_dir(self.store, self.critic_fingerprint),
            critic_identity(self.critic_fingerprint, self.tokenizer, self.template),
        )


def acquire_targets(
    teaching: Teaching, sequences: Sequence[TokenSequence], store: TargetStore
) -> AcquireReport:
    """The teacher's targets of all sequences; it is started only for those that are missing."""

    @contextmanager
    def open_teacher() -> Iterator[Ask]:
        with _pool(teaching, teaching.teacher) as pool:
            yield lambda asked: pool.targets(asked, teaching.targets)

    return acquire(sequences, store, open_teacher, "teacher")


def acquire_critic(
    teaching: Teaching, sequences: Sequence[TokenSequence], store: TargetStore
) -> AcquireReport:
    """log p₀ of all sequences' labels, likewise."""

    @contextmanager
    def open_critic() -> Iterator[Ask]:
        with _pool(teaching, teaching.critic) as pool:
            yield lambda asked: [
                Record(per_label={"label_logprobs": logprobs})
                for logprobs in pool.label_logprobs(asked, 1.0)
            ]

    return acquire(sequences, store, open_critic, "critic")


@contextmanager
def _pool(teaching: Teaching, model: str) -> Iterator[TeacherPool]:
    pool = TeacherPool(model, teaching.pool, teaching.deadline_s)
    try:
        yield pool
    finally:
        pool.stop()
