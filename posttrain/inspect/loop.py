"""How the loop ran: signal, staleness, who waited for whom. Figures of the charts."""

from __future__ import annotations

import numpy as np
import polars as pl

from posttrain.inspect.ledger_frames import policy_step_of_version
from posttrain.inspect.run import Run
from posttrain.inspect.windows import COLUMNS, add_windows, share_within
from posttrain.types import DrawOutcome

ENDS = ("trainable", "all correct", "none correct", "stale", "errored")
"""How an answered or given-up group came out of the gate."""

TEACHER = ("teacher/", "trainer/distill/")
"""How the names of what a teacher's weights did begin, in RL and in SFT."""

ROLES = {
    "learner_idle_share": "learner waits for groups",
    "rollout_idle_share": "engines without a request",
    "judge_idle_share": "judge without a prompt",
    "teacher_idle_share": "teacher without a group",
}


def group_ends(draws: pl.DataFrame, columns: int = COLUMNS) -> pl.DataFrame:
    """What share of the groups could be trained on: `step_from`, `step_to`, `end` (see ENDS),
    `place`, `groups`, `share`, and where the shares stand on one another: `below`, `above`. Draws
    that the stage's end cut off are left out."""
    outcome = pl.col("outcome")
    end = (
        pl.when(outcome == str(DrawOutcome.TRAINED))
        .then(pl.lit("trainable"))
        .when(outcome == str(DrawOutcome.ZERO_ADVANTAGE))
        .then(pl.col("reason").str.replace("_", " "))
        .when(outcome.is_in([str(DrawOutcome.STALE), str(DrawOutcome.ERRORED)]))
        .then(outcome)
    )
    ended = draws.with_columns(end.alias("end")).drop_nulls(["end", "step"])
    return (
        add_windows(ended, columns)
        .group_by("step_from", "step_to", "end")
        .agg(pl.len().alias("groups"))
        .with_columns(
            share_within("step_from"),
            pl.col("end")
            .replace_strict(ENDS, list(range(len(ENDS))), return_dtype=pl.Int64)
            .alias("place"),
        )
        .sort("step_from", "place")
        .with_columns(pl.col("share").cum_sum().over("step_from").alias("above"))
        .with_columns((pl.col("above") - pl.col("share")).alias("below"))
        .select("step_from", "step_to", "end", "place", "groups", "share", "below", "above")
    )


def staleness(run: Run) -> pl.DataFrame:
    """Trained groups by lag, the optimizer steps between the weights of their oldest token and
    those that they trained: `lag`, `groups`, `share`."""
    trained = run.draws.lazy().filter(pl.col("outcome") == str(DrawOutcome.TRAINED))
    oldest = run.answers.group_by("draw_id", "attempt").agg(
        policy_step_of_version("oldest_version").min().alias("oldest")
    )
    return (
        trained.join(oldest, on=["draw_id", "attempt"])
        .group_by((pl.col("step") - 1 - pl.col("oldest")).alias("lag"))
        .agg(pl.len().alias("groups"))
        .sort("lag")
        .with_columns((pl.col("groups") / pl.col("groups").sum()).alias("share"))
        .collect(engine="streaming")
    )


def by_age(steps: pl.DataFrame) -> pl.DataFrame:
    """What the learner measured on tokens of each age: `step`, `age` (optimizer steps), `measure`
    (`k3`, nats, between engine and learner; `clipped_fraction`), `value`."""
    columns = [c for c in steps.columns if c.startswith("learner/") and "_age_" in c]
    parts = pl.col("name").str.extract_groups(r"^learner/(?<measure>.+)_age_(?<age>\d+)$")
    return (
        steps.select("step", *columns)
        .unpivot(index="step", variable_name="name")
        .drop_nulls("value")
        .with_columns(parts)
        .unnest("name")
        .with_columns(pl.col("age").cast(pl.Int64))
        .sort("measure", "age", "step")
        .select("step", "age", "measure", "value")
    )


def idle(steps: pl.DataFrame, columns: int = COLUMNS) -> pl.DataFrame:
    """Who stood still: `step_from`, `step_to`, `role`, `share` of the time of these steps."""
    known = [name for name in ROLES if steps[name].is_not_null().any()]
    timed = steps.filter(pl.col("step_s").is_not_null())
    return (
        add_windows(timed, columns)
        .unpivot(known, index=["step_from", "step_to", "step_s"], variable_name="role")
        .drop_nulls("value")
        .group_by("step_from", "step_to", "role")
        .agg(((pl.col("value") * pl.col("step_s")).sum() / pl.col("step_s").sum()).alias("share"))
        .with_columns(pl.col("role").replace_strict(ROLES))
        .sort("role", "step_from")
    )


def over_time(steps: pl.DataFrame, name: str) -> float | None:
    """Mean of a share over the stage's seconds; None where it was not measured."""
    if name not in steps.columns:
        return None
    known = steps.filter(pl.col(name).is_not_null() & pl.col("step_s").is_not_null())
    if known.is_empty():
        return None
    return float(np.average(known[name].to_numpy(), weights=known["step_s"].to_numpy()))


def distillation(steps: pl.DataFrame) -> pl.DataFrame:
    """What the co-distilling teacher's weights did (λ, α, its priors, the gap to the student):
    `stage`, `step`, `weight`, `value`."""
    columns = [c for c in steps.columns if c.startswith(TEACHER)]
    return (
        steps.select("stage", "step", *columns)
        .unpivot(index=["stage", "step"], variable_name="weight")
        .drop_nulls("value")
        .with_columns(pl.col("weight").str.replace(r"^(trainer/distill|teacher)/", ""))
        .sort("stage", "weight", "step")
    )
