"""What scorer processes and their template are asked. A module of its own: the template runs
`rewards.worker` as its main module, and what is pickled must have the same name on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from posttrain.types import Prompt, Rollout, SystemInstruction
from rewards.score import Finding


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """To the template: import everything that the prompt's verifiers need. Answered with None."""

    prompt: Prompt


@dataclass(frozen=True, slots=True)
class Fork:
    """To the template, followed by the handle of a socket: start a process that answers there.
    Answered with its process id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reap:
    """To the template: a process that was killed, or has died. Answered with its exit code."""

    pid: int


@dataclass(frozen=True, slots=True)
class StartSandbox:
    """To a process that is going to score programs. Answered with None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOne:
    """To a process: one answer; `prompt` is None for that of the request before. Answered with a
    Reward."""

    prompt: Prompt | None
    rollout: Rollout
    system: SystemInstruction | None
    given: Mapping[str, Finding]


@dataclass(frozen=True, slots=True, kw_only=True)
class AskModel:
    """To a process: a group for the reward model. Answered with a finding for each text."""

    prompt: Prompt
    texts: tuple[str, ...]
    system: SystemInstruction | None
