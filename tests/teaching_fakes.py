"""Sequences, records and a teacher that counts what it is asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from posttrain.teaching.records import Record, TokenSequence

IDENTITY = {"teacher": "t1", "temperature": 1.0}


def sequence(*token_ids: int, prompt: int = 1) -> TokenSequence:
    """All tokens behind the first `prompt` are labels."""
    return TokenSequence(
        token_ids=np.array(token_ids, dtype=np.int64),
        label_mask=np.arange(len(token_ids)) >= prompt,
    )


def record_of(asked: TokenSequence) -> Record:
    """Of each label: one id, or two where it is odd; values that name the label."""
    labels = asked.token_ids[asked.label_mask]
    widths = 1 + labels % 2
    ids = np.concatenate([[label, 99][:width] for label, width in zip(labels, widths, strict=True)])
    return Record(
        per_label={
            "label_logprobs": -labels.astype(np.float32),
            "entropy": np.full(len(labels), 0.5, dtype=np.float32),
            "num_ids": widths.astype(np.uint8),
        },
        per_id={
            "ids": ids.astype(np.uint8),
            "counts": np.full(len(ids), 25, dtype=np.uint8),
        },
    )


class CountingTeacher:
    """Loads as `posttrain.teaching.acquire` wants it; takes `seconds` an answer and dies before its
    `dies_at`th."""

    def __init__(self, dies_at: int | None = None, seconds: float = 0.0) -> None:
        self.num_loads = 0
        self.asked: list[bytes] = []
        self._dies_at = dies_at
        self._seconds = seconds
        self._num_answers = 0

    def load(self) -> Callable[[Sequence[TokenSequence]], list[Record]]:
        self.num_loads += 1
        return self._answer

    def _answer(self, sequences: Sequence[TokenSequence]) -> list[Record]:
        if self._num_answers == self._dies_at:
            raise ConnectionError("the teacher died")
        self._num_answers += 1
        time.sleep(self._seconds)
        self.asked += [s.key for s in sequences]
        return [record_of(s) for s in sequences]
