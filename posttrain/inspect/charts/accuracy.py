"""Charts of held-out accuracy: by domain, and against time across runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import polars as pl

from posttrain.inspect.charts.look import (
    HEIGHT,
    SERIES,
    SHAPES,
    STAGE_COLOURS,
    STAGE_SHAPES,
    STAGES,
    WIDTH,
    finish,
    nothing,
    percent,
)
from posttrain.inspect.run import Run, stacked


def domain_accuracy(run: Run, metric: str = "pass@1") -> Any:
    """Held-out accuracy of each domain after each stage, with 95% intervals, hardest on top."""
    title = f"Held-out {metric} by domain after each stage"
    rows = run.accuracy.filter((pl.col("metric") == metric) & pl.col("step").is_null())
    if rows.is_empty():
        return nothing(title, "No policy of this run was evaluated.")
    stages = rows["stage"].unique(maintain_order=True).to_list()
    last = rows.filter((pl.col("stage") == stages[-1]) & (pl.col("domain") != "all"))
    order = ["all", *last.sort("mean")["domain"]]
    offset = alt.YOffset("stage:N", sort=stages)
    base = alt.Chart(rows).encode(
        y=alt.Y("domain:N", sort=order, axis=alt.Axis(title=None, grid=True)),
        yOffset=offset,
        color=alt.Color(
            "stage:N",
            sort=stages,
            scale=alt.Scale(domain=STAGES, range=STAGE_COLOURS),
            legend=alt.Legend(title="policy after", values=stages),
        ),
    )
    points = base.mark_point(filled=True, size=60, opacity=1).encode(
        x=alt.X("mean:Q", **percent(f"{metric}, 95% interval over prompts")),
        shape=alt.Shape(
            "stage:N",
            scale=alt.Scale(domain=STAGES, range=STAGE_SHAPES),
            legend=alt.Legend(title="policy after", values=stages),
        ),
        tooltip=["domain", "stage", "mean", "low", "high"],
    )
    ranges = base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q")
    hardest = last.sort("mean").row(0, named=True)
    return finish(
        alt.layer(ranges, points).properties(width=WIDTH, height=alt.Step(11)),
        title,
        f"Hardest after {stages[-1]}: {hardest['domain']}, {hardest['mean']:.2f}"
        f" [{hardest['low']:.2f}, {hardest['high']:.2f}]",
    )


def accuracy_by_time(runs: Run | Sequence[Run], metric: str = "pass@1") -> Any:
    """Held-out accuracy against the seconds that a run has worked, for one run or several."""
    title = f"Held-out {metric} against time"
    runs = [runs] if isinstance(runs, Run) else runs
    rows = (
        stacked(runs, "accuracy")
        .filter((pl.col("metric") == metric) & (pl.col("domain") == "all"))
        .drop_nulls("elapsed_s")
        .with_columns((pl.col("elapsed_s") / 60).alias("minutes"))
        .sort("run", "minutes")
    )
    if rows.is_empty():
        return nothing(title, "No policy of these runs was evaluated.")
    during = pl.format("{}, step {}", "stage", "step")
    named = rows.with_columns(
        pl.when(pl.col("step").is_null())
        .then(pl.col("stage").replace("start", "at the start"))
        .otherwise(during)
        .alias("when")
    )
    base = alt.Chart(named).encode(
        x=alt.X(
            "minutes:Q",
            axis=alt.Axis(title="minutes of work, all stages"),
            scale=alt.Scale(zero=True),
        ),
        color=alt.Color(
            "run:N",
            scale=alt.Scale(range=SERIES),
            legend=alt.Legend(title="run") if len(runs) > 1 else None,
        ),
    )
    band = base.mark_area(opacity=0.2).encode(y="low:Q", y2="high:Q")
    line = base.mark_line().encode(y=alt.Y("mean:Q", **percent(f"{metric}, 95% interval")))
    points = base.mark_point(filled=True, size=60, opacity=1).encode(
        y="mean:Q",
        shape=alt.Shape("run:N", scale=alt.Scale(range=SHAPES), legend=None),
        tooltip=["run", "when", "minutes", "mean", "low", "high"],
    )
    words = base.mark_text(dy=-14, fontSize=11, color="#333333").encode(
        y="mean:Q", text="when:N", color=alt.value("#333333")
    )
    # Steps within RL stand too close to be named.
    layers = [band, line, points]
    if len(runs) == 1:
        layers.append(words.transform_filter(alt.datum.step == None))  # noqa: E711
    return finish(
        alt.layer(*layers).properties(width=WIDTH, height=HEIGHT),
        title,
        "After each stage, and during RL where it was evaluated; the time includes evaluations",
    )
