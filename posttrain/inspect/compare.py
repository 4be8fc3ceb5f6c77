"""Two runs compared: what differs, with intervals on the differences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from judges.estimators import pass_at_k
from posttrain.evaluation import BOOTSTRAP_SAMPLES, Estimate, paired_difference
from posttrain.inspect import loop
from posttrain.inspect.run import Run

Values = NDArray[np.float64]
EVAL_VALUES = ["num_samples", "num_correct", "greedy_correct", "tokens"]
PER_STEP = {
    "learner_idle_share": "share of the time the learner waits",
    "rollout_idle_share": "share of the engines' time without a request",
    "trained_tokens_per_s": "trained tokens a second",
    "step_s": "seconds a step",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """`difference` is `second` − `first` with its 95% interval; `over` says what was resampled."""

    metric: str
    domain: str
    first: float
    second: float
    difference: Estimate
    over: str

    @property
    def is_clear(self) -> bool:
        """The interval leaves zero out."""
        return self.difference.low > 0 or self.difference.high < 0


def compare(first: Run, second: Run) -> list[Difference]:
    """Held-out figures after the last stage that both evaluated, then how their loops ran.

    Paired over the prompts that both answered; where they share none, both are resampled.
    """
    return [*_held_out(first, second), *_loops(first, second)]


def last_common_stage(first: Run, second: Run) -> str | None:
    """The last stage of `first` after which both were evaluated."""
    there = set(second.evals["stage"])
    common = [stage for stage in first.evals["stage"].unique(maintain_order=True) if stage in there]
    return common[-1] if common else None


def _held_out(first: Run, second: Run) -> Iterator[Difference]:
    stage = last_common_stage(first, second)
    if stage is None:
        return
    sides = [run.evals.filter(pl.col("stage") == stage) for run in (first, second)]
    shared = sides[0].join(sides[1], on="prompt_id", suffix="_2")
    ks = [k for k in _ks(first) if shared.is_empty() or k in _ks(second)]
    for domain in ["all", *sorted(set(sides[0]["domain"]))]:
        of = pl.lit(value=True) if domain == "all" else pl.col("domain") == domain
        a, b = (side.filter(of) for side in sides)
        if not shared.is_empty():
            both = shared.filter(of)
            a = both.select(EVAL_VALUES)
            b = both.select(pl.col(f"{name}_2").alias(name) for name in EVAL_VALUES)
        for metric, left in _eval_metrics(a, ks).items():
            right = _eval_metrics(b, ks)[metric]
            if domain != "all" and metric != "pass@1":
                continue
            paired = not shared.is_empty()
            found = _difference(metric, domain, left, right, paired=paired)
            if found is not None:
                yield found


def _eval_metrics(rows: pl.DataFrame, ks: list[int]) -> dict[str, Values]:
    """One value a prompt; NaN where it has none."""
    counts = rows.select("num_samples", "num_correct").rows()
    rates = {
        f"pass@{k}": np.array([pass_at_k(n, c, k) if n >= k else np.nan for n, c in counts])
        for k in ks
    }
    return rates | {
        "greedy": _floats(rows["greedy_correct"].cast(pl.Float64)),
        "tokens": _floats(rows["tokens"]),
    }


def _ks(run: Run) -> list[int]:
    return [int(k) for k in run.settings.get("eval", {}).get("k", [1])]


def _difference(
    metric: str, domain: str, first: Values, second: Values, *, paired: bool
) -> Difference | None:
    if np.isnan(first).all() or np.isnan(second).all():
        return None
    if paired:
        if np.isnan(second - first).all():
            return None
        found, over = paired_difference(first, second), f"{len(first)} prompts, paired"
    else:
        found, over = unpaired_difference(first, second), f"{len(first)} and {len(second)} prompts"
    return Difference(
        metric=metric,
        domain=domain,
        first=float(np.nanmean(first)),
        second=float(np.nanmean(second)),
        difference=found,
        over=over,
    )


def unpaired_difference(first: Values, second: Values, seed: int = 0) -> Estimate:
    """mean(second) − mean(first), 95% percentile bootstrap over both apart. NaN is left out."""
    rng = np.random.default_rng(seed)

    def means(values: Values) -> Values:
        known = values[~np.isnan(values)]
        picks = rng.integers(len(known), size=(BOOTSTRAP_SAMPLES, len(known)))
        return np.asarray(known[picks].mean(axis=1))

    low, high = np.percentile(-means(first) + means(second), [2.5, 97.5])
    mean = float(np.nanmean(second) - np.nanmean(first))
    return Estimate(mean=mean, low=float(low), high=float(high))


def _loops(first: Run, second: Run) -> Iterator[Difference]:
    signal = [_signal(run) for run in (first, second)]
    if all(len(values) for values in signal):
        yield Difference(
            metric="share of groups that could be trained on",
            domain="all",
            first=float(signal[0].mean()),
            second=float(signal[1].mean()),
            difference=unpaired_difference(signal[0], signal[1]),
            over=f"{len(signal[0])} and {len(signal[1])} groups",
        )
    for name, metric in PER_STEP.items():
        of_rl = pl.col("stage") == "rl"
        left, right = (_floats(run.steps.filter(of_rl)[name]) for run in (first, second))
        if np.isnan(left).all() or np.isnan(right).all():
            continue
        yield Difference(
            metric=metric,
            domain="all",
            first=float(np.nanmean(left)),
            second=float(np.nanmean(right)),
            difference=unpaired_difference(left, right),
            over=f"{len(left)} and {len(right)} steps",
        )


def _signal(run: Run) -> Values:
    """1 for each group that could be trained on, 0 for the others."""
    ends = loop.group_ends(run.draws).group_by("end").agg(pl.col("groups").sum())
    counts = dict(ends.rows())
    trainable = counts.get("trainable", 0)
    return np.repeat([1.0, 0.0], [trainable, sum(counts.values()) - trainable])


def _floats(series: pl.Series) -> Values:
    return np.asarray(series.fill_null(float("nan")).to_numpy(), np.float64)
