"""What judging asks: a running engine, and a scorer for its answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from posttrain.data.chat import ChatFormat
from posttrain.types import Generator, Scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticModel:
    """The checkpoint that judges."""

    name: str
    fingerprint: str
    chat: ChatFormat


class TokenScorer(Protocol):
    """Log-probabilities of given tokens but the first: `[T-1]` nats for each sequence of T."""

    async def __call__(
        self, sequences: Sequence[Sequence[int]], label: str
    ) -> list[list[float]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Critic:
    """A checkpoint that is being served."""

    generator: Generator
    scorer: Scorer
    score_tokens: TokenScorer


OpenCritic = Callable[[], AbstractAsyncContextManager[Critic]]
"""Starts the engine; called only if there is something to ask."""
