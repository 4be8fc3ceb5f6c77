"""Scoring a group of rollouts here and now: pure, synchronous, without a time limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from posttrain.errors import DataError
from posttrain.types import Outcome, Prompt, Reward, Rollout, SystemInstruction
from rewards.score import Verifier, failed
from rewards.shaping import RewardSettings, combine
from rewards.verifiers import VERIFIERS, verifier_of


def score_rollouts(
    prompt: Prompt,
    rollouts: Sequence[Rollout],
    system: SystemInstruction | None,
    settings: RewardSettings,
    verifiers: Mapping[str, Verifier] = VERIFIERS,
) -> tuple[Reward, ...]:
    """One reward per rollout, in order. Raises DataError for a prompt that cannot be scored at all
    (`check_references` finds those at load); never for what an answer contains.
    """
    verifier = verifier_of(prompt, settings, verifiers)
    return tuple(_score_one(verifier, prompt, rollout, system, settings) for rollout in rollouts)


def _score_one(
    verifier: Verifier,
    prompt: Prompt,
    rollout: Rollout,
    system: SystemInstruction | None,
    settings: RewardSettings,
) -> Reward:
    if rollout.truncated:
        score = failed(Outcome.TRUNCATED, "the token limit came before the end of the answer")
    else:
        try:
            score = verifier(prompt, rollout.text)
        except DataError:
            raise
        except (MemoryError, RecursionError) as error:
            score = failed(Outcome.LIMIT, f"scoring ended with {type(error).__name__}")
        except Exception as error:  # what a verifier depends on failed: a judge, a service
            return unscored(f"the verifier raised {type(error).__name__}: {error}")
    return combine(score, rollout, system, settings)


def unscored(why: str) -> Reward:
    """An answer that could not be scored through no fault of its own."""
    return Reward(value=None, correctness=None, outcome=Outcome.INFRASTRUCTURE, explanation=why)
