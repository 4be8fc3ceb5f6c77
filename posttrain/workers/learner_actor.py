"""A rank of the learner in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.types import PolicyVersion, TrainingBatch
from posttrain.workers.learner import DeepSpeedLearner
from posttrain.workers.learner_config import free_address
from posttrain.workers.settings import LearnerSettings
from posttrain.workers.weights import clear_leftovers


class LearnerActor:
    """A `DeepSpeedLearner` behind Ray. All ranks are told `ready` at the same time.

    Args:
        scratch: of the rank that writes weights: where those of a learner that was killed may
            still lie. The driver clears its own node only.
    """

    def __init__(
        self,
        model_path: str,
        settings: LearnerSettings,
        *,
        scratch: str | None = None,
        **keywords: Any,
    ) -> None:
        self._scratch = scratch
        self._start = partial(DeepSpeedLearner, model_path, settings, **keywords)
        self._learner: DeepSpeedLearner | None = None

    def address(self) -> str:
        """Where the ranks may meet, if this is the first of them."""
        return free_address()

    def ready(self, address: str) -> None:
        if self._scratch is not None:
            clear_leftovers(Path(self._scratch))
        self._learner = self._start(address=address)

    def step(self, share: TrainingBatch) -> dict[str, float]:
        return self._running.step(share)

    def can_share_prompts(self) -> bool:
        return self._running.can_share_prompts()

    def write_weights(self, directory: str) -> float:
        return self._running.write_weights(directory)

    def score_tokens(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return self._running.score_tokens(sequences)

    def save_policy(self, directory: str, tokenizer_path: str) -> None:
        self._running.save_policy(directory, tokenizer_path)

    def save_adapter(self, directory: str) -> None:
        self._running.save_adapter(directory)

    def save_checkpoint(self, directory: str, version: PolicyVersion) -> None:
        self._running.save_checkpoint(directory, version)

    @property
    def _running(self) -> DeepSpeedLearner:
        assert self._learner is not None, "ready() comes first"
        return self._learner
