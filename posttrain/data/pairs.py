"""Preference pairs mined from scored groups; each names the corner case that it mends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field

from posttrain.types import Outcome, PreferencePair, Reward, Rollout, RolloutGroup

CornerCase = Literal["instruction", "malformed", "overlong", "wrong"]


class MiningSettings(BaseModel):
    """The sampling pass before DPO and what counts as a pair.

    `num_prompts` training prompts get `samples` answers each, a share `instructed_share` of them
    under a system instruction, each of these as often as the others: whether an instruction is
    followed shows nowhere else. A pair is *overlong* when the rejected answer has at least
    `overlong_ratio` times the tokens of the chosen one, and answers of its length are not right
    more often than those of the chosen one's; *wrong* and *malformed* keep the longer answer
    below `matched_ratio` times the shorter, so that length teaches nothing.

    Of the newest groups that online RL left on disk `stored_groups` are looked at, too. They were
    written by earlier policies: a pair of theirs is taken only if the policy that DPO starts from
    finds both answers likely, per token no less than all but the share `unlikely` of its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    cases: list[CornerCase] = list(get_args(CornerCase))
    num_prompts: int = Field(default=512, gt=0)
    samples: int = Field(default=8, ge=2)
    instructed_share: float = Field(default=0.5, ge=0, le=1)
    pairs_per_prompt: int = Field(default=2, gt=0)
    overlong_ratio: float = Field(default=2.0, gt=1)
    matched_ratio: float = Field(default=1.5, gt=1)
    temperature: float = Field(default=1.0, gt=0)
    max_tokens: int = Field(default=512, gt=0)
    concurrency: int = Field(default=64, gt=0)
    stored_groups: int = Field(default=0, ge=0)
    unlikely: float = Field(default=0.05, ge=0, lt=1)


class Candidate(NamedTuple):
    """One scored answer of a group."""

    rollout: Rollout
    reward: Reward

    @property
    def length(self) -> int:
        return len(self.rollout.completion_token_ids)

    @property
    def follows(self) -> float | None:
        """1 or 0; None without a system instruction that can be checked."""
        return self.reward.components.get("instruction")


Group = Sequence[Candidate]
Rule = Callable[[Candidate, Candidate, Group, MiningSettings], bool]
"""Whether (chosen, rejected) of a group are a pair of the corner case."""


def _wrong(chosen: Candidate, rejected: Candidate, _: Group, settings: MiningSettings) -> bool:
    return (
        chosen.reward.correct
        and rejected.reward.outcome is Outcome.WRONG
        and chosen.follows == rejected.follows
        and _lengths_match(chosen, rejected, settings)
    )


def _malformed(chosen: Candidate, rejected: Candidate, _: Group, settings: MiningSettings) -> bool:
    # Not "of equal correctness": what cannot be read is never correct, so that the chosen would
    # always be wrong, and what they say would be learnt together with how they say it.
    return (
        rejected.reward.outcome is Outcome.UNPARSABLE
        and chosen.reward.correct
        and _lengths_match(chosen, rejected, settings)
    )


def _lengths_match(chosen: Candidate, rejected: Candidate, settings: MiningSettings) -> bool:
    shorter, longer = sorted((chosen.length, rejected.length))
    return longer < settings.matched_ratio * shorter


def _overlong(
    chosen: Candidate, rejected: Candidate, group: Group, settings: MiningSettings
) -> bool:
    return (
        chosen.reward.correct
        and rejected.reward.correct
        and chosen.follows == rejected.follows
        and rejected.length >= settings.overlong_ratio * chosen.length
        and not _length_pays(chosen, rejected, group)
    )


def _length_pays(chosen: Candidate, rejected: Candidate, group: Group) -> bool:
    """Whether answers as long as the rejected one are right more often than those as short as the
    chosen one. Then they are long for a reason, and DPO would take the reasoning away."""
    short = [c.reward.correct for c in group if c.length <= chosen.length]
    long = [c.reward.correct for c in group if c.length >= rejected.length]
    return fmean(long) > fmean(short)


def _instruction(chosen: Candidate, rejected: Candidate, _: Group, __: MiningSettings) -> bool:
    return (
        chosen.follows == 1.0
        and rejected.follows == 0.0
        and chosen.reward.correct >= rejected.reward.correct
    )


RULES: Mapping[CornerCase, Rule] = {
    "instruction": _instruction,
    "malformed": _malformed,
    "overlong": _overlong,
    "wrong": _wrong,
}


def mine_pairs(group: RolloutGroup, settings: MiningSettings) -> list[PreferencePair]:
    """At most `pairs_per_prompt` pairs of a group, the cases in the order of the settings.

    No answer is used twice, nor another of the same text. Truncated and unscored answers are never
    chosen, nor those that ignore their instruction: whatever a pair is about, it would teach that
    too. Unscored ones are never rejected either.
    """
    scored = [
        Candidate(rollout, reward)
        for rollout, reward in zip(group.rollouts, group.rewards, strict=True)
        if reward.value is not None
    ]
    pairs: list[PreferencePair] = []
    used: set[str] = set()
    for case in settings.cases:
        for chosen, rejected in _ordered_pairs(scored):
            if len(pairs) == settings.pairs_per_prompt:
                return pairs
            texts = {chosen.rollout.text, rejected.rollout.text}
            if not texts & used and RULES[case](chosen, rejected, scored, settings):
                used |= texts
                pairs.append(_pair(group, chosen, rejected, case))
    return pairs


def at_most_per_prompt(pairs: Iterable[PreferencePair], most: int) -> list[PreferencePair]:
    """The first `most` of each prompt, whichever of its groups they are of."""
    counts: Counter[str] = Counter()
    kept = []
    for pair in pairs:
        counts[pair.prompt.prompt_id] += 1
        if counts[pair.prompt.prompt_id] <= most:
            kept.append(pair)
    return kept


def _ordered_pairs(scored: list[Candidate]) -> Iterator[tuple[Candidate, Candidate]]:
    for chosen in scored:
        if chosen.rollout.truncated or chosen.follows == 0.0:
            continue
        for rejected in scored:
            if rejected.rollout.text != chosen.rollout.text:
                yield chosen, rejected


def _pair(
    group: RolloutGroup, chosen: Candidate, rejected: Candidate, case: CornerCase
) -> PreferencePair:
    assert chosen.reward.value is not None
    assert rejected.reward.value is not None
    return PreferencePair(
        prompt=group.prompt,
        system=group.system,
        chosen=chosen.rollout.text,
        rejected=rejected.rollout.text,
        corner_case=case,
        margin=chosen.reward.value - rejected.reward.value,
    )
