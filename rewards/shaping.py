"""From a verifier's score to the reward that trains: correctness plus weighted terms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from posttrain.types import Outcome, Prompt, Reward, Rollout, SystemInstruction
from rewards.code import CodeSettings
from rewards.judged import JudgedSettings
from rewards.reward_model import RewardModelSettings
from rewards.score import Score

Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class OverlongPenalty(BaseModel):
    """A ramp from 0 to −1 over the last `buffer` tokens before `limit` (DAPO, eq. 13)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    limit: int = Field(gt=0, description="completion tokens from which the penalty is whole")
    buffer: int = Field(gt=0, description="tokens over which it grows")
    weight: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _buffer_fits(self) -> OverlongPenalty:
        if self.buffer > self.limit:
            raise ValueError(f"buffer {self.buffer} is larger than limit {self.limit}")
        return self


class RewardSettings(BaseModel):
    """Which verifier scores a domain, and what is added to correctness."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    default_verifier: str = Field(
        default="exact", description="for prompts whose source names no verifier"
    )
    verifiers: dict[str, str] = Field(
        default_factory=dict, description="domain -> verifier, over what the source names"
    )
    added: dict[str, dict[str, Weight]] = Field(
        default_factory=dict,
        description="domain -> further verifier -> weight: added to what trains, never to "
        "correctness",
    )
    custom: dict[str, str] = Field(
        default_factory=dict, description="name -> `module:function`, verifiers of one's own"
    )
    deadline_s: float = Field(
        default=10.0, gt=0, description="seconds that one verifier may take over one answer"
    )
    deadlines_s: dict[str, Seconds] = Field(
        default_factory=dict, description="verifier -> seconds, where they differ"
    )
    instruction_weight: float = Field(
        default=0.0, ge=0, description="reward for following the system instruction's pattern"
    )
    overlong_penalty: OverlongPenalty | None = None
    code: CodeSettings = CodeSettings()
    judge: JudgedSettings | None = None
    reward_model: RewardModelSettings | None = None

    @property
    def models(self) -> dict[str, str]:
        """Section -> the checkpoint that it names, of those that name one."""
        named = {
            "judge": None if self.judge is None else self.judge.model,
            "reward_model": None if self.reward_model is None else self.reward_model.model,
        }
        return {section: model for section, model in named.items() if model is not None}

    @model_validator(mode="after")
    def _deadlines_fit(self) -> RewardSettings:
        if self.code.answer_s >= self.deadline_of("code"):
            raise ValueError(
                f"code.answer_s = {self.code.answer_s:g} must be below the deadline of the verifier"
                f" code, {self.deadline_of('code'):g} s; lower it or set deadlines_s.code"
            )
        return self

    def deadline_of(self, verifier: str) -> float:
        """Seconds."""
        return self.deadlines_s.get(verifier, self.deadline_s)


def combine(
    score: Score,
    added: Mapping[str, float],
    prompt: Prompt,
    rollout: Rollout,
    system: SystemInstruction | None,
    settings: RewardSettings,
) -> Reward:
    """The reward of one scored rollout. `components` holds the unweighted terms: `correctness`,
    what each further verifier has found (`added`, under its name), `instruction` (1 or 0; only with
    a system instruction that has a pattern) and `length` (in [−1, 0]; only with an overlong
    penalty). Difficulty and gates read correctness alone.
    """
    components = {"correctness": score.correctness, **added}
    weights = settings.added.get(prompt.domain, {})
    value = score.correctness + sum(weights[name] * term for name, term in added.items())
    if system is not None and system.pattern is not None:
        components["instruction"] = _follows(system.pattern, rollout, score.outcome)
        value += settings.instruction_weight * components["instruction"]
    if settings.overlong_penalty is not None:
        num_tokens = len(rollout.completion_token_ids)
        components["length"] = overlong(num_tokens, settings.overlong_penalty)
        value += settings.overlong_penalty.weight * components["length"]
    return Reward(
        value=value,
        correctness=score.correctness,
        outcome=score.outcome,
        components=components,
        explanation=score.explanation,
    )


def _follows(pattern: str, rollout: Rollout, outcome: Outcome) -> float:
    # What was cut off or had to be stopped earns nothing for its form; and a text that may have
    # hung this very pattern is not matched against it again.
    if outcome in (Outcome.TRUNCATED, Outcome.LIMIT):
        return 0.0
    return float(re.fullmatch(pattern, rollout.text) is not None)


def overlong(num_tokens: int, penalty: OverlongPenalty) -> float:
    """0 up to `limit − buffer` completion tokens, −1 from `limit` on, linear between
    (DAPO, arXiv:2503.14476, eq. 13)."""
    excess = num_tokens - (penalty.limit - penalty.buffer)
    return -min(max(excess / penalty.buffer, 0.0), 1.0)
