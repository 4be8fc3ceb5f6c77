"""Which prompts are kept: the easiest dropped by quantile or threshold, the unsolved on request.

`choose` works on arrays, a million prompts in about a second; `select` turns verdicts into
decisions with reasons that a person can read.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from judges.estimators import expected_pass_at_k
from posttrain.types import Action, Decision, Label, Verdict

# Among the hardest few percent wrong gold answers collect, so there the unsolved go by default.
DROP_UNSOLVED_ABOVE = 0.9

Metric = Literal["pass@1", "pass@k", "grade", "ifd"]
Rule = Literal[
    "drop_easiest", "easy_above", "drop_below", "drop_unsolved", "ifd_above_1", "min_per_domain"
]
RULES: tuple[Rule, ...] = get_args(Rule)


class SelectionSettings(BaseModel):
    """Exactly one cut on the metric: `drop_easiest`, a share of the prompts; or a threshold,
    `easy_above` on a pass rate, `drop_below` on a grade or IFD.

    The metric is the posterior expectation of pass@1 or pass@k, or what a judge that looks once
    says; low grades and low IFD count as easy: they are the first to go. `by_domain` takes the
    share from each domain instead of from all; `min_per_domain` takes back the hardest that the
    cut dropped until a domain has as many. `drop_unsolved` None means: only when more than 90%
    would be dropped.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: Metric = "pass@1"
    k: int | None = Field(default=None, gt=1)
    drop_easiest: float | None = Field(default=None, ge=0, lt=1)
    easy_above: float | None = Field(default=None, gt=0, lt=1)
    drop_below: float | None = None
    by_domain: bool = False
    min_per_domain: int = Field(default=0, ge=0)
    drop_unsolved: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        cuts = ("drop_easiest", "easy_above" if self.is_rate else "drop_below")
        given = [
            n for n in ("drop_easiest", "easy_above", "drop_below") if getattr(self, n) is not None
        ]
        if len(given) != 1 or given[0] not in cuts:
            raise ValueError(
                f"set exactly one of {cuts[0]} and {cuts[1]} for {self.metric}, got "
                f"{', '.join(f'{name}={getattr(self, name)}' for name in given) or 'none'}"
            )
        if (self.metric == "pass@k") != (self.k is not None):
            raise ValueError(
                f"k goes with metric pass@k and only with it, got {self.metric} with k={self.k}"
            )
        if self.by_domain and self.drop_easiest is None:
            raise ValueError("by_domain goes with drop_easiest: a threshold is the same everywhere")
        return self

    @property
    def is_rate(self) -> bool:
        return self.metric in ("pass@1", "pass@k")

    @property
    def metric_name(self) -> str:
        return f"pass@{self.k}" if self.metric == "pass@k" else self.metric

    @property
    def threshold(self) -> float | None:
        """In terms of easiness; None for a share."""
        return self.easy_above if self.drop_below is None else -self.drop_below


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Arrays `[N]`: whether a prompt is kept, and by which of `RULES` (its index). `cuts` holds
    for each domain (a single one without `by_domain`) the threshold, or the easiness of the
    easiest that the share leaves; None where it leaves none."""

    kept: NDArray[np.bool_]
    rule: NDArray[np.int8]
    cuts: tuple[float | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionSummary:
    """Counts of a selection. `unsolved_share` is that among the kept, None if nothing is kept:
    high, it says that what is left may be mislabelled rather than hard."""

    kept: int
    dropped: int
    unsolved_share: float | None
    kept_by_label: Mapping[Label, int]
    dropped_by_label: Mapping[Label, int]


def choose(
    easiness: NDArray[np.float64],
    excluded: NDArray[np.bool_],
    domain: NDArray[np.integer],
    tie: NDArray[np.uint64],
    settings: SelectionSettings,
) -> Selection:
    """Keep or drop N prompts, every argument `[N]`.

    The `excluded` are dropped (unsolved prompts where these go; for IFD what is above 1), and
    `drop_easiest` counts among those that are left. `domain` holds codes from 0; `tie` orders
    prompts of equal easiness.
    """
    kept = ~excluded
    cut_rule: Rule = "drop_easiest" if settings.drop_easiest is not None else "easy_above"
    excluded_rule: Rule = "drop_unsolved"
    if not settings.is_rate:
        cut_rule = "drop_easiest" if settings.drop_easiest is not None else "drop_below"
        excluded_rule = "ifd_above_1"
    rule = np.where(kept, RULES.index(cut_rule), RULES.index(excluded_rule)).astype(np.int8)
    ranked = np.lexsort((tie, -easiness))
    ranked = ranked[kept[ranked]]
    cuts: list[float | None] = []
    if settings.threshold is not None:
        kept &= easiness <= settings.threshold
        cuts.append(settings.threshold)
    else:
        assert settings.drop_easiest is not None
        for group in _split(ranked, domain) if settings.by_domain else [ranked]:
            count = quantile_count(settings.drop_easiest, len(group))
            kept[group[:count]] = False
            cuts.append(float(easiness[group[count]]) if len(group) else None)
    if settings.min_per_domain:
        for group in _split(ranked, domain):
            missing = max(0, settings.min_per_domain - int(kept[group].sum()))
            dropped = group[~kept[group]]
            taken_back = dropped[len(dropped) - min(missing, len(dropped)) :]
            kept[taken_back] = True
            rule[taken_back] = RULES.index("min_per_domain")
    return Selection(kept=kept, rule=rule, cuts=tuple(cuts))


def drops_unsolved(
    easiness: NDArray[np.float64], weight: NDArray[np.float64], settings: SelectionSettings
) -> bool:
    """Whether unsolved prompts are dropped, where prompts of this easiness occur `weight` times."""
    if settings.drop_unsolved is not None:
        return settings.drop_unsolved
    if settings.drop_easiest is not None:
        return settings.drop_easiest > DROP_UNSOLVED_ABOVE
    assert settings.easy_above is not None
    too_easy = weight[easiness > settings.easy_above].sum()
    return bool(too_easy > DROP_UNSOLVED_ABOVE * weight.sum())


def _split(ranked: NDArray[np.integer], domain: NDArray[np.integer]) -> list[NDArray[np.integer]]:
    """The ranked prompts of each domain, those without one included."""
    count = int(domain.max()) + 1 if len(domain) else 0
    return [ranked[domain[ranked] == code] for code in range(count)]


def easiness_of(a: float, b: float, settings: SelectionSettings) -> float:
    """Expected pass@1 or pass@k under Beta(a, b)."""
    return expected_pass_at_k(a, b, settings.k or 1)


def easiness(verdict: Verdict, settings: SelectionSettings) -> float:
    """Expected pass@1 or pass@k under the verdict's posterior."""
    return easiness_of(*verdict.posterior, settings)


def select(
    verdicts: Sequence[Verdict],
    settings: SelectionSettings,
    domains: Mapping[str, str] | None = None,
) -> list[Decision]:
    """One decision per verdict, in their order.

    `domains` (prompt id -> domain) is needed for `by_domain` and `min_per_domain`. Raises
    ValueError if it is needed and not given, or if a prompt has two verdicts.
    """
    _check_unique(verdicts)
    if domains is None and (settings.by_domain or settings.min_per_domain):
        raise ValueError("by_domain and min_per_domain need the prompts' domains")
    names = [domains[v.prompt_id] if domains else "" for v in verdicts]
    codes = {name: code for code, name in enumerate(sorted(set(names)))}
    domain = np.array([codes[name] for name in names], dtype=np.int64)
    values = np.array([easiness(v, settings) for v in verdicts])
    unsolved = np.array([v.label is Label.UNSOLVED for v in verdicts], dtype=bool)
    selection = choose(
        values,
        unsolved & drops_unsolved(values, np.ones(len(values)), settings),
        domain,
        np.array([tie_break(v.prompt_id) for v in verdicts], dtype=np.uint64),
        settings,
    )
    cut_index = domain if settings.by_domain else np.zeros_like(domain)
    return [
        Decision(
            prompt_id=verdict.prompt_id,
            action=Action.KEEP if kept else Action.DROP,
            rule=RULES[rule],
            reason=reason(
                RULES[rule],
                bool(kept),
                easiness=value,
                counts=f"{verdict.num_correct} of {verdict.num_samples} correct",
                cut=selection.cuts[index],
                settings=settings,
            ),
            verdict=verdict,
        )
        for verdict, kept, rule, value, index in zip(
            verdicts, selection.kept, selection.rule, values, cut_index, strict=True
        )
    ]


def reason(
    rule: Rule,
    kept: bool,
    *,
    easiness: float,
    counts: str | None,
    cut: float | None,
    settings: SelectionSettings,
) -> str:
    """Why a prompt was kept or dropped, for a person: `pass@1 0.833 (7 of 8 correct) is …`.
    `counts` is None for a judge that looks once."""
    if rule == "drop_unsolved":
        return f"unsolved: {counts}; its reference may be wrong"
    sign = 1 if settings.is_rate else -1
    found = f"{settings.metric_name} {sign * easiness:.3f}" + (f" ({counts})" if counts else "")
    if rule == "ifd_above_1":
        return f"{found} is above 1: the prompt does not help to predict the answer"
    assert cut is not None
    if rule == "min_per_domain":
        return f"{found} is too easy, but its domain keeps at least {settings.min_per_domain}"
    if rule == "drop_easiest":
        assert settings.drop_easiest is not None
        share = f"{settings.drop_easiest * 100:g}%{' of its domain' if settings.by_domain else ''}"
        most = "easiest" if settings.is_rate else "lowest"
        among = "not among" if kept else "among"
        return f"{found} is {among} the {most} {share} (the {most} kept has {sign * cut:.3f})"
    side = "above" if settings.is_rate else "below"
    return f"{found} is {'not ' if kept else ''}{side} {sign * cut:g}"


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


def tie_break(prompt_id: str) -> int:
    """A number below 2⁶⁴ that orders prompts of equal easiness, whatever their ids look like."""
    return int.from_bytes(hashlib.blake2b(prompt_id.encode(), digest_size=8).digest())


def _check_unique(verdicts: Sequence[Verdict]) -> None:
    prompt_id, count = next(iter(Counter(v.prompt_id for v in verdicts).most_common(1)), ("", 0))
    if count > 1:
        raise ValueError(f"prompt {prompt_id} has {count} verdicts: select by one critic at a time")
