"""How difficult prompts are, what was pruned for it, and how that moves: figures of the charts."""

from __future__ import annotations

import polars as pl

from curricula.buckets import BUCKETS
from posttrain.inspect.windows import COLUMNS, add_windows, share_within

RATE_BINS = ("0", *(f".{i}–{f'.{i + 1}' if i < 9 else '1'}" for i in range(10)), "1")
"""Never right, ten open intervals, always right."""

POOL = (*BUCKETS, "dropped")
ENOUGH = 5
"""Prompts from which on an interval over them is worth drawing."""
UNDECIDED = "no selection"
"""Screened for RL's curriculum alone, which drops nothing beforehand."""


def screened(verdicts: pl.DataFrame, prompts: pl.DataFrame) -> pl.DataFrame:
    """The last verdict of each prompt that a checkpoint gave before RL, with scored answers: the
    one that the curriculum starts from. Earlier ones are of a screening that was done again, as are
    those of `prompts` that are in no set that is screened."""
    before_rl = verdicts.filter(pl.col("step").is_null())
    last = before_rl.unique("prompt_id", keep="last", maintain_order=True)
    return last.filter(
        pl.col("pass_rate").is_not_null()
        & _is_among(prompts, pl.col("in_train") | pl.col("in_sft"))
    )


def pass_rate_bins(verdicts: pl.DataFrame, prompts: pl.DataFrame) -> pl.DataFrame:
    """Screened prompts by pass rate and what selection did: `place` in RATE_BINS, `bin`, `action`,
    `prompts`. A rate between two bins counts in the upper one."""
    rate = pl.col("pass_rate")
    # Rounded, because 0.7 * 10 is 7.000000000000001 of floats.
    inner = (rate * 10).round(9).floor().cast(pl.Int64) + 1
    place = pl.when(rate == 0).then(0).when(rate == 1).then(11).otherwise(inner)
    return (
        screened(verdicts, prompts)
        .group_by(place.alias("place"), pl.col("action").fill_null(UNDECIDED))
        .agg(pl.len().alias("prompts"))
        .with_columns(_name("place", RATE_BINS).alias("bin"))
        .sort("place", "action")
        .select("place", "bin", "action", "prompts")
    )


def pruned(verdicts: pl.DataFrame, prompts: pl.DataFrame) -> pl.DataFrame:
    """What was decided, by whom and about what: `stage`, `rule`, `domain`, `place` and `bucket` of
    the pass rate, `action`, `prompts`, `lowest` and `highest` pass rate of theirs. Of several
    decisions of a stage on a prompt the last one counts; stages in the order of their first. What
    was decided for SFT on prompts that are not in its set is of a screening of other data."""
    counts = (pl.col("stage") != "sft") | _is_among(prompts, pl.col("in_sft"))
    return (
        verdicts.filter(pl.col("action").is_not_null() & pl.col("pass_rate").is_not_null() & counts)
        .with_row_index("first")
        .with_columns(pl.col("first").min().over("stage", "rule"))
        .unique(["stage", "prompt_id"], keep="last", maintain_order=True)
        .group_by(
            *("first", "stage", "rule", "domain", "action"),
            bucket_place(pl.col("pass_rate")).alias("place"),
        )
        .agg(
            pl.len().alias("prompts"),
            pl.col("pass_rate").min().alias("lowest"),
            pl.col("pass_rate").max().alias("highest"),
        )
        .with_columns(_name("place", BUCKETS).alias("bucket"))
        .sort("first", "domain", "place", "action")
        .drop("first")
    )


def drawn_difficulty(draws: pl.DataFrame, columns: int = COLUMNS) -> pl.DataFrame:
    """How hard what was drawn proved to be: `step_from`, `step_to`, `place` in BUCKETS, `bucket`,
    `groups`, `share` of the answered groups of these steps."""
    rate = pl.col("num_correct") / pl.col("num_scored")
    answered = draws.filter((pl.col("num_scored") > 0) & pl.col("step").is_not_null())
    return (
        add_windows(answered, columns)
        .group_by("step_from", "step_to", bucket_place(rate).alias("place"))
        .agg(pl.len().alias("groups"))
        .with_columns(share_within("step_from"), _name("place", BUCKETS).alias("bucket"))
        .sort("step_from", "place")
        .select("step_from", "step_to", "place", "bucket", "groups", "share")
    )


def bucket_moves(verdicts: pl.DataFrame, most: int = 4) -> pl.DataFrame:
    """Prompts that RL judged again, by bucket of their verdict before and of this one: `step`,
    `before`, `after` (places in BUCKETS), `prompts`. At most `most` re-screenings, spread over
    the run, the last one among them."""
    moved = (
        verdicts.filter(pl.col("pass_rate").is_not_null())
        .with_columns(bucket_place(pl.col("pass_rate")).alias("after"))
        .with_columns(pl.col("after").shift(1).over("prompt_id").alias("before"))
        .filter(pl.col("step").is_not_null() & pl.col("before").is_not_null())
    )
    steps = moved["step"].unique().sort().to_list()
    every = -(-len(steps) // most)
    shown = steps[::-1][:: max(every, 1)]
    return (
        moved.filter(pl.col("step").is_in(shown))
        .group_by("step", "before", "after")
        .agg(pl.len().alias("prompts"))
        .sort("step", "before", "after")
    )


def pool(steps: pl.DataFrame) -> pl.DataFrame:
    """The curriculum over time: `step`, `domain`, `place` in POOL, `bucket`, `prompts`."""
    columns = [name for name in steps.columns if name.startswith("pool/")]
    long = (
        steps.select("step", *columns)
        .unpivot(index="step", variable_name="cell", value_name="prompts")
        .drop_nulls()
    )
    cell = pl.col("cell").str.extract_groups(r"^pool/(?<domain>.+)/(?<bucket>[^/]+)$")
    return (
        long.with_columns(cell)
        .unnest("cell")
        .with_columns(
            pl.col("prompts").cast(pl.Int64),
            pl.col("bucket")
            .replace_strict(POOL, list(range(len(POOL))), return_dtype=pl.Int64)
            .alias("place"),
        )
        .sort("step", "domain", "place")
        .select("step", "domain", "place", "bucket", "prompts")
    )


def calibration(verdicts: pl.DataFrame, prompts: pl.DataFrame, draws: pl.DataFrame) -> pl.DataFrame:
    """The judge's estimate against what the policy did when it first drew the prompt, early and
    late in RL: `period` (`first third`, `last third` of the steps), `place` and `bucket` of the
    estimate, `judged` and `later` (mean pass rates), `low`, `high` (95% interval of `later`,
    normal, over prompts; null for fewer than ENOUGH), `prompts`."""
    answered = draws.filter((pl.col("num_scored") > 0) & pl.col("step").is_not_null())
    last = answered["step"].max()  # of RL: most prompts are first drawn long before
    first = (
        answered.unique("prompt_id", keep="first", maintain_order=True)
        .with_columns((pl.col("num_correct") / pl.col("num_scored")).alias("rate"))
        .select("prompt_id", "step", "rate")
    )
    period = (
        pl.when(pl.col("step") * 3 <= pl.lit(last))
        .then(pl.lit("first third"))
        .when(pl.col("step") * 3 > pl.lit(last) * 2)
        .then(pl.lit("last third"))
    )
    error = 1.96 * pl.col("rate").std() / pl.when(pl.len() >= ENOUGH).then(pl.len()).sqrt()
    return (
        screened(verdicts, prompts)
        .select("prompt_id", "pass_rate")
        .join(first.with_columns(period.alias("period")).drop_nulls("period"), on="prompt_id")
        .group_by("period", bucket_place(pl.col("pass_rate")).alias("place"))
        .agg(
            pl.col("pass_rate").mean().alias("judged"),
            pl.col("rate").mean().alias("later"),
            (pl.col("rate").mean() - error).clip(0, 1).alias("low"),
            (pl.col("rate").mean() + error).clip(0, 1).alias("high"),
            pl.len().alias("prompts"),
        )
        .with_columns(_name("place", BUCKETS).alias("bucket"))
        .sort("period", "place")
    )


def bucket_place(rate: pl.Expr) -> pl.Expr:
    """As `curricula.buckets.bucket_of`: the place of pass rates in BUCKETS."""
    return (
        pl.when(rate == 0)
        .then(0)
        .when(rate == 1)
        .then(5)
        .otherwise((rate * 4).ceil().clip(1, 4))
        .cast(pl.Int64)
    )


def _is_among(prompts: pl.DataFrame, wanted: pl.Expr) -> pl.Expr:
    """Whether the prompt of a row is one of those `wanted`; true for a run that did not keep its
    prompts. Where it did, a prompt that only the ledger knows is not in its data any more."""
    if prompts["in_train"].is_null().all():
        return pl.lit(value=True)
    return pl.col("prompt_id").is_in(prompts.filter(wanted)["prompt_id"].implode())


def _name(place: str, names: tuple[str, ...]) -> pl.Expr:
    return pl.col(place).replace_strict(list(range(len(names))), names, return_dtype=pl.String)
