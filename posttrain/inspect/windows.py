"""Steps that are shown together, so that a long run has no more columns than a short one."""

from __future__ import annotations

import polars as pl

COLUMNS = 40
"""Windows of a chart over steps: as many as can be told apart."""


def window_width(last_step: int, columns: int) -> int:
    """Steps in each of at most `columns` windows that start at step 1.

    >>> window_width(45, 30), window_width(7, 30)
    (2, 1)
    """
    return max(1, -(-last_step // columns))


def add_windows(frame: pl.DataFrame, columns: int) -> pl.DataFrame:
    """`frame` with `step_from` (included) and `step_to` (excluded) of each row's `step`."""
    last = frame["step"].max()
    width = window_width(int(last) if isinstance(last, int) else 1, columns)
    first = (pl.col("step") - 1).floordiv(width) * width + 1
    return frame.with_columns(first.alias("step_from"), (first + width).alias("step_to"))


def last_of_windows(frame: pl.DataFrame, columns: int = COLUMNS) -> pl.DataFrame:
    """Of figures that stand at a step, a pool's size for example: those of the first step of all
    and of the last in each window. The columns stay the same."""
    with_windows = add_windows(frame, columns)
    last = pl.col("step") == pl.col("step").max().over("step_from")
    first = pl.col("step") == pl.col("step").min()
    return with_windows.filter(first | last).select(frame.columns)


def window_means(frame: pl.DataFrame, *keys: str, columns: int = COLUMNS) -> pl.DataFrame:
    """Of figures that are measured in each step: the mean of `value` by `keys` and window:
    `step_from`, `step_to`, the keys, `value`. Stages, where they are a key, count their own steps
    and are divided each by itself."""
    parts = frame.partition_by("stage") if "stage" in keys else []
    return (
        pl.concat([add_windows(part, columns) for part in parts or [frame]])
        .group_by("step_from", "step_to", *keys)
        .agg(pl.col("value").mean())
        .sort(*keys, "step_from")
    )


def share_within(*keys: str, count: str = "groups") -> pl.Expr:
    """Of the rows with the same `keys`."""
    return (pl.col(count) / pl.col(count).sum().over(keys)).alias("share")
