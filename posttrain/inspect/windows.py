"""Steps that are shown together, so that a long run has no more columns than a short one."""

from __future__ import annotations

import polars as pl


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


def share_within(*keys: str, count: str = "groups") -> pl.Expr:
    """Of the rows with the same `keys`."""
    return (pl.col(count) / pl.col(count).sum().over(keys)).alias("share")
