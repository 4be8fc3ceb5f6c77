"""Who teaches, and under what its word is stored: nothing is mixed that depends on something else.

STORE/targets/            what the teacher says
STORE/critic-0123…/       log p₀ by one frozen critic; they are many, none depends on the teacher
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from posttrain.teaching.settings import TargetSettings
from posttrain.teaching.store import Identity, TargetStore, check_identity


@dataclass(frozen=True, slots=True, kw_only=True)
class Teaching:
    """A teacher and the frozen critic beside it: checkpoint directories, their fingerprints, those
    of the tokenizer and the chat template, the dtype both compute in, what is stored, and where."""

    teacher: str
    teacher_fingerprint: str
    critic: str
    critic_fingerprint: str
    tokenizer: str
    template: str
    dtype: str
    targets: TargetSettings
    store: Path

    def check_store(self) -> None:
        """Raises StoreError if the store was made with something else; makes nothing."""
        check_identity(self._targets_dir, self.targets_identity)

    def open_targets(self) -> TargetStore:
        """Raises StoreError as `check_store` does."""
        return TargetStore(self._targets_dir, self.targets_identity)

    def open_critic(self) -> TargetStore:
        directory = self.store / f"critic-{self.critic_fingerprint[:12]}"
        return TargetStore(directory, self.critic_identity)

    @property
    def targets_identity(self) -> Identity:
        return {
            "format": "posttrain teacher targets 2",
            "teacher": self.teacher_fingerprint,
            "tokenizer": self.tokenizer,
            "template": self.template,
            "dtype": self.dtype,
            **self.targets.model_dump(mode="json"),
        }

    @property
    def critic_identity(self) -> Identity:
        return {
            "format": "posttrain critic log-probabilities 2",
            "critic": self.critic_fingerprint,
            "tokenizer": self.tokenizer,
            "template": self.template,
            "dtype": self.dtype,
        }

    @property
    def _targets_dir(self) -> Path:
        return self.store / "targets"
