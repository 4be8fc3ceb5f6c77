"""Scoring rollouts here and now: pure, synchronous, without a time limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from posttrain.errors import DataError, SettingsError
from posttrain.types import Outcome, Prompt, Reward, Rollout, SystemInstruction
from rewards.score import Finding, Score, Unscored, Verifier, failed
from rewards.shaping import RewardSettings, combine
from rewards.verifiers import VERIFIERS, named_verifier, verifier_names

NOTHING_GIVEN: Mapping[str, Finding] = {}


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
    return tuple(
        score_rollout(prompt, rollout, system, settings, verifiers) for rollout in rollouts
    )


def score_rollout(
    prompt: Prompt,
    rollout: Rollout,
    system: SystemInstruction | None,
    settings: RewardSettings,
    verifiers: Mapping[str, Verifier] = VERIFIERS,
    given: Mapping[str, Finding] = NOTHING_GIVEN,
) -> Reward:
    """`given` holds what remote verifiers have found already. A rollout is unscored if one of its
    verifiers could not do its work: a sum with a term missing is no reward. Raises as
    `score_rollouts` does."""
    names = verifier_names(prompt, settings)
    if rollout.truncated:
        cut = failed(Outcome.TRUNCATED, "the token limit came before the end of the answer")
        return stopped(cut, prompt, rollout, system, settings)
    scores: list[Score] = []
    for name in names:
        finding = given.get(name)
        if finding is None:
            verifier = named_verifier(name, prompt, settings, verifiers)
            finding = _find(verifier, prompt, rollout.text)
        if isinstance(finding, Unscored):
            return unscored(finding.why)
        scores.append(finding)
    decisive, *others = scores
    added = {name: score.correctness for name, score in zip(names[1:], others, strict=True)}
    return combine(decisive, added, prompt, rollout, system, settings)


def _find(verifier: Verifier, prompt: Prompt, text: str) -> Finding:
    try:
        return verifier(prompt, text)
    except (DataError, SettingsError):
        raise
    except (MemoryError, RecursionError) as error:
        return failed(Outcome.LIMIT, f"scoring ended with {type(error).__name__}")
    except Exception as error:  # what a verifier depends on failed: a library, a service
        return Unscored(f"the verifier raised {type(error).__name__}: {error}")


def stopped(
    score: Score,
    prompt: Prompt,
    rollout: Rollout,
    system: SystemInstruction | None,
    settings: RewardSettings,
) -> Reward:
    """The reward of an answer that was cut off or had to be stopped: further verifiers are not
    asked, and give nothing."""
    added = dict.fromkeys(settings.added.get(prompt.domain, ()), 0.0)
    return combine(score, added, prompt, rollout, system, settings)


def unscored(why: str) -> Reward:
    """An answer that could not be scored through no fault of its own."""
    return Reward(value=None, correctness=None, outcome=Outcome.INFRASTRUCTURE, explanation=why)
