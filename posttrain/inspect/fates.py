"""What became of each prompt that RL could draw."""

from __future__ import annotations

from typing import Literal, get_args

import polars as pl

from posttrain.types import Action, DrawOutcome

Fate = Literal[
    "trained",
    "trained, then pruned",
    "no signal",
    "pruned",
    "stale",
    "errored",
    "not finished",
    "never drawn",
]
FATES: tuple[Fate, ...] = get_args(Fate)
"""- *trained*: at least once, and still drawn from
- *trained, then pruned*: at least once; re-screening found it easy and took it out
- *no signal*: every group of it that was answered was all right or all wrong
- *pruned*: re-screening took it out before it was trained on
- *stale*, *errored*: past the deadline or unscored each time it was drawn
- *not finished*: drawn, but the stage ended first or is under way
- *never drawn*"""


def add_fates(prompts: pl.DataFrame, draws: pl.DataFrame, verdicts: pl.DataFrame) -> pl.DataFrame:
    """`prompts` with `num_draws`, `num_trained`, `num_right`, `num_scored` and `fate`."""

    def times(outcome: DrawOutcome) -> pl.Expr:
        return (pl.col("outcome") == str(outcome)).sum().cast(pl.Int64)

    by_prompt = draws.group_by("prompt_id").agg(
        pl.len().cast(pl.Int64).alias("num_draws"),
        times(DrawOutcome.TRAINED).alias("num_trained"),
        times(DrawOutcome.ZERO_ADVANTAGE).alias("no_signal"),
        times(DrawOutcome.STALE).alias("stale"),
        times(DrawOutcome.ERRORED).alias("errored"),
        pl.col("num_correct").sum().alias("num_right"),
        pl.col("num_scored").sum(),
    )
    counts = [name for name in by_prompt.columns if name != "prompt_id"]
    joined = prompts.join(by_prompt, on="prompt_id", how="left", maintain_order="left").join(
        _out_of_the_pool(verdicts), on="prompt_id", how="left", maintain_order="left"
    )
    drawable = pl.col("in_train").fill_null(~pl.col("in_held_out").fill_null(value=False))
    return joined.with_columns(
        pl.col(counts).fill_null(0), pl.col("out").fill_null(value=False)
    ).with_columns(pl.when(drawable).then(_fate()).alias("fate"))


def _fate() -> pl.Expr:
    rules: list[tuple[pl.Expr, Fate]] = [
        ((pl.col("num_trained") > 0) & pl.col("out"), "trained, then pruned"),
        (pl.col("num_trained") > 0, "trained"),
        (pl.col("out"), "pruned"),
        (pl.col("no_signal") > 0, "no signal"),
        (pl.col("errored") > 0, "errored"),
        (pl.col("stale") > 0, "stale"),
        (pl.col("num_draws") > 0, "not finished"),
    ]
    return pl.coalesce(pl.when(rule).then(pl.lit(fate)) for rule, fate in rules).fill_null(
        "never drawn"
    )


def _out_of_the_pool(verdicts: pl.DataFrame) -> pl.DataFrame:
    """Prompts whose last decision of RL is to drop them: `prompt_id`, `out`."""
    return (
        verdicts.filter(pl.col("step").is_not_null() & pl.col("action").is_not_null())
        .unique("prompt_id", keep="last", maintain_order=True)
        .select("prompt_id", (pl.col("action") == str(Action.DROP)).alias("out"))
    )
