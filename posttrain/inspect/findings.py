"""What a reader looks for first, in sentences with their figures."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from posttrain.inspect import difficulty, loop
from posttrain.inspect.run import Run
from posttrain.types import Action

NOTABLE_IDLE = 0.1
"""A role that stands still for a smaller share of the time is not what bounds the other."""
LOW_ESS = 0.9
MUCH_CLIPPED = 0.01
"""Of the batch's effective sample size, and of the oldest tokens: beyond these staleness costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """An answer to `question`; `figures` are what it rests on."""

    question: str
    answer: str
    figures: dict[str, float | int | str | None]


def findings(run: Run) -> list[Finding]:
    """Those that the run has data for."""
    found = [gained(run), hardest_domain(run), what_was_pruned(run), bound(run), stale(run)]
    return [finding for finding in found if finding is not None]


def gained(run: Run) -> Finding | None:
    """Accuracy of the policy that came in and of the last one."""
    rows = run.accuracy.filter(
        (pl.col("metric") == "pass@1") & (pl.col("domain") == "all") & pl.col("step").is_null()
    )
    if len(rows) < 2:
        return None
    ends = {row["stage"]: row["mean"] for row in rows.iter_rows(named=True)}
    path = " → ".join(f"{stage} {_rate(mean)}" for stage, mean in ends.items())
    return Finding(
        question="What did it bring?", answer=f"Held-out pass@1: {path}.", figures=dict(ends)
    )


def hardest_domain(run: Run) -> Finding | None:
    """By held-out accuracy after the last stage; without an evaluation, by screening."""
    question = "Which domain is hard?"
    rows = run.accuracy.filter(
        (pl.col("metric") == "pass@1") & (pl.col("domain") != "all") & pl.col("step").is_null()
    )
    if rows.is_empty():
        return _hardest_in_screening(run, question)
    stage = rows["stage"][-1]
    last = rows.filter(pl.col("stage") == stage).sort("mean")
    hardest, easiest = last.row(0, named=True), last.row(-1, named=True)
    text = (
        f"{hardest['domain']}: pass@1 {_rate(hardest['mean'])}"
        f" [{_rate(hardest['low'])}, {_rate(hardest['high'])}] after {stage}"
    )
    before = rows.filter(
        (pl.col("domain") == hardest["domain"]) & (pl.col("stage") == rows["stage"][0])
    )
    if rows["stage"][0] != stage:
        text += f", {_rate(before['mean'][0])} at the start"
    if len(last) > 1:
        text += f". Easiest: {easiest['domain']}, {_rate(easiest['mean'])}"
    return Finding(
        question=question,
        answer=f"{text}.",
        figures={"domain": hardest["domain"], "pass@1": hardest["mean"]},
    )


def _hardest_in_screening(run: Run, question: str) -> Finding | None:
    judged = difficulty.screened(run.verdicts, run.prompts).drop_nulls("domain")
    if judged.is_empty():
        return None
    by_domain = (
        judged.group_by("domain").agg(pl.col("pass_rate").mean(), pl.len()).sort("pass_rate")
    )
    domain, rate, count = by_domain.row(0)
    return Finding(
        question=question,
        answer=f"{domain}: pass rate {_rate(rate)} in screening, over {count:,} prompts.",
        figures={"domain": domain, "pass_rate": rate},
    )


def what_was_pruned(run: Run) -> Finding | None:
    """Prompts that selection dropped, by stage, rule and difficulty."""
    decided = difficulty.pruned(run.verdicts, run.prompts)
    if decided.is_empty():
        return None
    sentences = []
    figures: dict[str, float | int | str | None] = {}
    for (stage, rule), group in decided.group_by(["stage", "rule"], maintain_order=True):
        dropped = group.filter(pl.col("action") == str(Action.DROP))
        count, of = int(dropped["prompts"].sum()), int(group["prompts"].sum())
        figures[f"{stage}/{rule}/dropped"], figures[f"{stage}/{rule}/judged"] = count, of
        sentence = f"{stage}: {count:,} of {of:,} prompts dropped by {str(rule).replace('_', ' ')}"
        if count:
            low, high = dropped["lowest"].min(), dropped["highest"].max()
            assert isinstance(low, float) and isinstance(high, float)
            sentence += f" (pass rate {_rate(low)}{'' if low == high else f' to {_rate(high)}'})"
        sentences.append(sentence)
    back = run.rescreens["restored"].sum()
    if back:
        sentences.append(f"{back:,} came back when they were tested again")
    kept_unsolved = decided.filter(
        (pl.col("action") == str(Action.KEEP)) & (pl.col("highest") == 0)
    )["prompts"].sum()
    if kept_unsolved:
        sentences.append(
            f"{kept_unsolved:,} that were never solved are kept: look at their references"
        )
    return Finding(
        question="What was pruned, and why?", answer="; ".join(sentences) + ".", figures=figures
    )


def bound(run: Run) -> Finding | None:
    """Whether RL was learner- or rollout-bound, from who stood still how long."""
    learner = loop.over_time(run.steps, "learner_idle_share")
    rollouts = loop.over_time(run.steps, "rollout_idle_share")
    if learner is None:
        return None
    text = f"the learner waited for groups {learner:.0%} of the time"
    if rollouts is not None:
        text += f", the engines stood still for {rollouts:.0%} of theirs"
    if learner >= NOTABLE_IDLE and learner > (rollouts or 0.0):
        verdict = "Rollout-bound"
    elif (rollouts or 0.0) >= NOTABLE_IDLE:
        verdict = "Learner-bound"
    elif rollouts is None:
        verdict = "Not rollout-bound"
    else:
        verdict = "Balanced"
    return Finding(
        question="Is RL learner- or rollout-bound?",
        answer=f"{verdict}: {text}.",
        figures={
            "learner_idle_share": learner,
            "rollout_idle_share": rollouts,
            "bound": verdict.lower(),
        },
    )


def stale(run: Run) -> Finding | None:
    """How stale what was trained on was, and what the loss lost by it."""
    lag, worst = loop.over_time(run.steps, "lag_mean"), run.steps["lag_max"].max()
    if lag is None or not isinstance(worst, float):
        return None
    text = f"lag {lag:.2f} steps on average, {worst:.0f} at worst"
    figures: dict[str, float | int | str | None] = {"lag_mean": lag, "lag_max": worst}
    costs = False
    ess = loop.over_time(run.steps, "learner/ess")
    if ess is not None:
        text += f"; effective sample size {ess:.1%} of the batch"
        figures["ess"] = ess
        costs |= ess < LOW_ESS
    ages = loop.by_age(run.steps).filter(pl.col("measure") == "clipped_fraction")
    if not ages.is_empty():
        oldest = ages["age"].max()
        clipped = ages.filter(pl.col("age") == oldest)["value"].mean()
        assert isinstance(clipped, float) and isinstance(oldest, int)
        text += f"; {clipped:.2%} of the tokens of age {oldest} clipped"
        figures["clipped_fraction_oldest"] = clipped
        costs |= clipped > MUCH_CLIPPED
    verdict = "It costs" if costs else "Hardly"
    if ess is None and ages.is_empty():
        verdict = "Not measured"
    return Finding(question="Does staleness hurt?", answer=f"{verdict}: {text}.", figures=figures)


def _rate(value: float) -> str:
    return f"{value:.2f}".removeprefix("0") if 0 <= value < 1 else f"{value:.2f}"
