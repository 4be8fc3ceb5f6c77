"""What a scorer process is asked. A module of its own: the process runs `rewards.worker` as its
main module, and what is pickled must have the same name on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from posttrain.types import Prompt, Rollout, SystemInstruction
from rewards.score import Finding


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Imports everything that the prompt's verifiers need. Answered with None."""

    prompt: Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOne:
    """One answer; `prompt` is None for that of the request before. Answered with a Reward."""

    prompt: Prompt | None
    rollout: Rollout
    system: SystemInstruction | None
    given: Mapping[str, Finding]


@dataclass(frozen=True, slots=True, kw_only=True)
class AskModel:
    """A group for the reward model. Answered with a finding for each text."""

    prompt: Prompt
    texts: tuple[str, ...]
    system: SystemInstruction | None


Request = Check | ScoreOne | AskModel
