"""What is recorded of every step, and of the whole loop."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from judges.estimators import pass_at_k
from posttrain.online.gate import Reason
from posttrain.online.lag import lag_of
from posttrain.online.teaching import Lesson
from posttrain.types import DrawOutcome, Outcome, PolicyVersion, Reward, RolloutGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One optimizer step: `metrics` lacks what could not be measured, it never holds a stand-in.
    `num_draws` counts those that the lineage had opened by then, `plans` are the domains of the
    groups of the batches that were planned, `learned` the draws in flight that the curriculum has
    learned from: their groups wait to be trained, or did when an earlier attempt was killed."""

    step: int
    version: PolicyVersion
    num_draws: int
    plans: Sequence[Sequence[str]]
    learned: Sequence[str]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSummary:
    """The whole loop. Counts cover this attempt; `draws_by_reason` those that ended untrained."""

    version: PolicyVersion
    num_steps: int
    seconds: float
    draws: Mapping[DrawOutcome, int]
    draws_by_reason: Mapping[str, int]
    trained_by_domain: Mapping[str, int]
    trained_tokens: int
    generated_tokens: int
    max_lag: int
    learning_seconds: float
    teacher: TeacherTotals | None


@dataclass(slots=True)
class Interval:
    """What came to the gate and which draws ended since the last step's record: how many by
    (outcome, reason, domain); the reason of a trained one is empty. `stale_lengths` holds the
    longest completion of each draw that passed its deadline, as far as it was written."""

    groups: list[RolloutGroup] = field(default_factory=list)
    ended: Counter[tuple[DrawOutcome, str, str]] = field(default_factory=Counter)
    stale_lengths: list[int] = field(default_factory=list)
    seats_passed_on: int = 0
    """Of domains without a signal for long, to others."""

    @property
    def generated_tokens(self) -> int:
        """Completion tokens; those of cancelled draws are not known."""
        return sum(_lengths(self.groups))


@dataclass(slots=True)
class TeacherTotals:
    """How long steps waited for the teacher, and how many groups were trained without its word."""

    waited_seconds: float = 0.0
    late_groups: int = 0


@dataclass(slots=True)
class Totals:
    """Sums over the attempt, for the summary."""

    trained_tokens: int = 0
    generated_tokens: int = 0
    max_lag: int = 0
    learning_seconds: float = 0.0
    teacher: TeacherTotals | None = None

    def add(
        self, trained_tokens: int, interval: Interval, times: StepTimes, lesson: Lesson
    ) -> None:
        """One step."""
        self.trained_tokens += trained_tokens
        self.generated_tokens += interval.generated_tokens
        self.learning_seconds += times.learning
        if lesson.weight is None:
            return
        self.teacher = self.teacher or TeacherTotals()
        self.teacher.waited_seconds += lesson.metrics["wait_s"]
        self.teacher.late_groups += int(lesson.metrics["late"])


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Seconds from the last record to this one, and the parts of it that have an owner."""

    interval: float
    waiting: float
    learning: float
    publishing: float


def summarise_loop(
    ended: Counter[tuple[DrawOutcome, str, str]],
    totals: Totals,
    *,
    version: PolicyVersion,
    num_steps: int,
    seconds: float,
) -> LoopSummary:
    """From the draws that ended in this attempt, by (outcome, reason, domain)."""
    draws, reasons, trained = ends(ended)
    return LoopSummary(
        version=version,
        num_steps=num_steps,
        seconds=seconds,
        draws=draws,
        draws_by_reason=reasons,
        trained_by_domain=trained,
        trained_tokens=totals.trained_tokens,
        generated_tokens=totals.generated_tokens,
        max_lag=totals.max_lag,
        learning_seconds=totals.learning_seconds,
        teacher=totals.teacher,
    )


def ends(
    ended: Mapping[tuple[DrawOutcome, str, str], int],
) -> tuple[Counter[DrawOutcome], Counter[str], Counter[str]]:
    """Draws by outcome; untrained ones by reason; trained ones by domain."""
    draws: Counter[DrawOutcome] = Counter()
    reasons: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    for (outcome, reason, domain), count in ended.items():
        draws[outcome] += count
        if outcome is DrawOutcome.TRAINED:
            trained[domain] += count
        else:
            reasons[reason] += count
    return draws, reasons, trained


def answer_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Quality of all answers of `groups`, rejected groups included: reward, pass@1, lengths.

    Shares are over scored answers (`unscored_share`: over all). pass@1 over rejected groups too,
    because over trained groups alone it would be near one half whatever the policy can do. pass@k
    for k = 2, 4, … up to the G answers of a group is the unbiased estimate over whole groups: G was
    fixed beforehand.
    """
    rewards = [r for group in groups for r in group.rewards]
    scored = [r for r in rewards if r.value is not None]
    by_domain: defaultdict[str, list[Reward]] = defaultdict(list)
    solved: defaultdict[str, list[float]] = defaultdict(list)
    followed: defaultdict[str, list[float]] = defaultdict(list)
    for group in groups:
        if group.num_scored == len(group.rewards):
            for k in _doubling(group.num_scored):
                value = pass_at_k(group.num_scored, group.num_correct, k)
                solved[f"pass@{k}"].append(value)
                solved[f"pass@{k}/{group.prompt.domain}"].append(value)
        for reward in group.rewards:
            if reward.value is None:
                continue
            by_domain[group.prompt.domain].append(reward)
            if group.system is not None and "instruction" in reward.components:
                followed[group.system].append(reward.components["instruction"])
    named: dict[str, Sequence[float]] = {
        "reward_mean": _values(scored),
        **{f"reward/{domain}": _values(by_domain[domain]) for domain in sorted(by_domain)},
        "pass@1": [r.correct for r in scored],
        **{f"pass@1/{d}": [r.correct for r in by_domain[d]] for d in sorted(by_domain)},
        **{name: solved[name] for name in sorted(solved)},
        "unparsable_share": [r.outcome is Outcome.UNPARSABLE for r in scored],
        "truncated_share": [r.outcome is Outcome.TRUNCATED for r in scored],
        "unscored_share": [r.value is None for r in rewards],
        "completion_length_mean": _lengths(groups),
        **{f"instruction/{system}": followed[system] for system in sorted(followed)},
    }
    return {name: fmean(values) for name, values in named.items() if values}


def step_metrics(
    interval: Interval,
    *,
    trained: Sequence[RolloutGroup],
    current: PolicyVersion,
    num_loss_tokens: int,
    times: StepTimes,
    queues: Mapping[str, int],
    learner: Mapping[str, float],
    publish: Mapping[str, float],
    teacher: Mapping[str, float],
) -> dict[str, float]:
    """The flat record of one step that trained `trained` under the weights `current`.

    `queues` counts the draws that are being generated, being scored, or ready to train. The busy
    share is the time inside `Learner.step`, the idle share the time spent waiting for groups;
    publishing and whatever runs after a step (evaluation, checkpoints) are neither.
    """
    lags = [lag_of(group, current) for group in trained]
    gated = len(interval.groups)
    by_place = {(o, f"{why}/{where}", where): n for (o, why, where), n in interval.ended.items()}
    outcomes, reasons, domains = ends(by_place)
    return {
        **answer_metrics(interval.groups),
        **(_signal(gated, interval.ended) if gated else {}),
        **_stale_lengths(interval.stale_lengths),
        "lag_max": max(lags),
        "lag_mean": fmean(lags),
        **{f"lag/{lag}": count for lag, count in sorted(Counter(lags).items())},
        "trained_tokens": num_loss_tokens,
        "trained_tokens_per_s": num_loss_tokens / times.interval,
        "generated_tokens_per_s": interval.generated_tokens / times.interval,
        "learner_busy_share": times.learning / times.interval,
        "learner_idle_share": times.waiting / times.interval,
        "publish_s": times.publishing,
        "step_s": times.interval,
        **{f"queue/{name}": count for name, count in queues.items()},
        "seats_passed_on": interval.seats_passed_on,
        **{f"draws/{outcome}": count for outcome, count in sorted(outcomes.items())},
        **{f"ended/{reason}": count for reason, count in sorted(reasons.items())},
        **{f"trained/{domain}": count for domain, count in sorted(domains.items())},
        **{f"learner/{name}": value for name, value in learner.items()},
        **{f"publish/{name}": value for name, value in publish.items()},
        **{f"teacher/{name}": value for name, value in teacher.items()},
    }


def _signal(gated: int, ended: Mapping[tuple[DrawOutcome, str, str], int]) -> dict[str, float]:
    """Shares of the groups that came to the gate: those without a signal, and those with one. Of
    those that could not be scored nobody knows."""
    equal = sum(n for (end, _, _), n in ended.items() if end is DrawOutcome.ZERO_ADVANTAGE)
    unscored = sum(n for (_, why, _), n in ended.items() if why == Reason.UNSCORED)
    return {
        "zero_advantage_share": equal / gated,
        "signal_share": (gated - equal - unscored) / gated,
    }


def _stale_lengths(lengths: Sequence[int]) -> dict[str, float]:
    if not lengths:
        return {}
    return {"stale_length_mean": fmean(lengths), "stale_length_max": max(lengths)}


def _doubling(most: int) -> list[int]:
    """2, 4, … below `most`, and `most` itself if it is more than one."""
    below = [2**i for i in range(1, most.bit_length()) if 2**i < most]
    return [*below, most] if most > 1 else []


def _values(rewards: Iterable[Reward]) -> list[float]:
    return [reward.value for reward in rewards if reward.value is not None]


def _lengths(groups: Iterable[RolloutGroup]) -> list[int]:
    return [len(rollout.completion_token_ids) for group in groups for rollout in group.rollouts]
