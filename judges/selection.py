"""Which prompts are kept: the easiest dropped by quantile or threshold, the unsolved on request."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from judges.estimators import expected_pass_at_k
from posttrain.types import Action, Decision, Label, Verdict

# Among the hardest few percent wrong gold answers collect, so there the unsolved go by default.
DROP_UNSOLVED_ABOVE = 0.9


class SelectionSettings(BaseModel):
    """Exactly one cut: `drop_easiest`, a share of the prompts, or `easy_above`, on the metric.

    The metric is the posterior expectation of pass@1 or pass@k. `drop_unsolved` None means: only
    when more than 90% would be dropped.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: Literal["pass@1", "pass@k"] = "pass@1"
    k: int | None = Field(default=None, gt=1)
    drop_easiest: float | None = Field(default=None, ge=0, lt=1)
    easy_above: float | None = Field(default=None, gt=0, lt=1)
    drop_unsolved: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.drop_easiest is None) == (self.easy_above is None):
            raise ValueError(
                "set exactly one of drop_easiest and easy_above, got "
                f"drop_easiest={self.drop_easiest}, easy_above={self.easy_above}"
            )
        if (self.metric == "pass@k") != (self.k is not None):
            raise ValueError(
                f"k goes with metric pass@k and only with it, got {self.metric} with k={self.k}"
            )
        return self

    @property
    def metric_name(self) -> str:
        return f"pass@{self.k or 1}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionSummary:
    """Counts of a selection. `unsolved_share` is that among the kept, None if nothing is kept:
    high, it says that what is left may be mislabelled rather than hard."""

    kept: int
    dropped: int
    unsolved_share: float | None
    kept_by_label: Mapping[Label, int]
    dropped_by_label: Mapping[Label, int]


def easiness(verdict: Verdict, settings: SelectionSettings) -> float:
    """Expected pass@1 or pass@k under the verdict's posterior."""
    return expected_pass_at_k(*verdict.posterior, settings.k or 1)


def select(verdicts: Sequence[Verdict], settings: SelectionSettings) -> list[Decision]:
    """One decision per verdict, in their order; raises ValueError if a prompt has two verdicts.

    Where the unsolved are dropped, `drop_easiest` counts among the prompts that are left.
    """
    _check_unique(verdicts)
    drops_unsolved = _drops_unsolved(verdicts, settings)
    solved = [v for v in verdicts if not (drops_unsolved and v.label is Label.UNSOLVED)]
    if settings.easy_above is not None:
        dropped = {v.prompt_id for v in solved if easiness(v, settings) > settings.easy_above}
        rule, cut = "easy_above", settings.easy_above
    else:
        assert settings.drop_easiest is not None
        ranked = sorted(solved, key=lambda v: (-easiness(v, settings), _tie_break(v.prompt_id)))
        count = quantile_count(settings.drop_easiest, len(ranked))
        dropped = {v.prompt_id for v in ranked[:count]}
        rule, cut = "drop_easiest", easiness(ranked[count], settings) if ranked else 1.0
    decisions = []
    for verdict in verdicts:
        if drops_unsolved and verdict.label is Label.UNSOLVED:
            decisions.append(_drop_unsolved(verdict))
        else:
            action = Action.DROP if verdict.prompt_id in dropped else Action.KEEP
            decisions.append(_decide(verdict, action, rule, cut, settings))
    return decisions


def quantile_count(share: float, total: int) -> int:
    """⌊share · total⌋ with the share read as the decimal it was written as: .29 of 100 is 29."""
    return int(Fraction(str(share)) * total)


def summarise(decisions: Sequence[Decision]) -> SelectionSummary:
    """What was kept and dropped, by label."""
    kept = Counter(d.verdict.label for d in decisions if d.action is Action.KEEP)
    dropped = Counter(d.verdict.label for d in decisions if d.action is Action.DROP)
    return SelectionSummary(
        kept=kept.total(),
        dropped=dropped.total(),
        unsolved_share=kept[Label.UNSOLVED] / kept.total() if kept else None,
        kept_by_label=dict(kept),
        dropped_by_label=dict(dropped),
    )


def _check_unique(verdicts: Sequence[Verdict]) -> None:
    prompt_id, count = next(iter(Counter(v.prompt_id for v in verdicts).most_common(1)), ("", 0))
    if count > 1:
        raise ValueError(f"prompt {prompt_id} has {count} verdicts: select by one critic at a time")


def _drops_unsolved(verdicts: Sequence[Verdict], settings: SelectionSettings) -> bool:
    if settings.drop_unsolved is not None:
        return settings.drop_unsolved
    if settings.drop_easiest is not None:
        return settings.drop_easiest > DROP_UNSOLVED_ABOVE
    assert settings.easy_above is not None
    too_easy = sum(easiness(v, settings) > settings.easy_above for v in verdicts)
    return too_easy > DROP_UNSOLVED_ABOVE * len(verdicts)


def _tie_break(prompt_id: str) -> bytes:
    return hashlib.blake2b(prompt_id.encode(), digest_size=8).digest()


def _decide(
    verdict: Verdict, action: Action, rule: str, cut: float, settings: SelectionSettings
) -> Decision:
    found = f"{settings.metric_name} {easiness(verdict, settings):.3f} ({_counts(verdict)})"
    if rule == "easy_above":
        relation = f"{'above' if action is Action.DROP else 'not above'} {cut:g}"
    else:
        assert settings.drop_easiest is not None
        among = "among" if action is Action.DROP else "not among"
        share = f"{settings.drop_easiest * 100:g}%"
        relation = f"{among} the easiest {share} (the easiest kept has {cut:.3f})"
    return Decision(
        prompt_id=verdict.prompt_id,
        action=action,
        rule=rule,
        reason=f"{found} is {relation}",
        verdict=verdict,
    )


def _drop_unsolved(verdict: Verdict) -> Decision:
    return Decision(
        prompt_id=verdict.prompt_id,
        action=Action.DROP,
        rule="drop_unsolved",
        reason=f"unsolved: {_counts(verdict)}; its reference may be wrong",
        verdict=verdict,
    )


def _counts(verdict: Verdict) -> str:
    return f"{verdict.num_correct} of {verdict.num_samples} correct"
