"""Charts of the loop: signal, staleness, who waited, where prompts went, distillation."""

from __future__ import annotations

from typing import Any

import altair as alt
import polars as pl

from posttrain.inspect import loop
from posttrain.inspect.charts.look import (
    BLACK,
    BLUE,
    GREY,
    HEIGHT,
    ORANGE,
    PURPLE,
    SERIES,
    SKY,
    VERMILION,
    WIDTH,
    YELLOW,
    finish,
    nothing,
    percent,
    rectangle_of_window,
    steps_axis,
)
from posttrain.inspect.fates import FATES
from posttrain.inspect.run import Run

END_COLOURS = [BLUE, YELLOW, PURPLE, ORANGE, VERMILION]
FATE_COLOURS = [BLUE, SKY, PURPLE, YELLOW, ORANGE, VERMILION, BLACK, GREY]


def trainable_share(run: Run) -> Any:
    """Which share of the groups carried a signal, and why the others did not."""
    title = "Share of groups that could be trained on"
    ends = loop.group_ends(run.draws)
    if ends.is_empty():
        return nothing(title, "No draw has ended in this run.")
    bars = (
        alt.Chart(ends)
        .mark_rect()
        .encode(
            **rectangle_of_window(),
            y=alt.Y("below:Q", **percent("share of groups")),
            y2="above:Q",
            color=alt.Color(
                "end:N",
                sort=list(loop.ENDS),
                scale=alt.Scale(domain=list(loop.ENDS), range=END_COLOURS),
                legend=alt.Legend(title="group"),
            ),
            tooltip=["step_from", "end", "groups", alt.Tooltip("share", format=".0%")],
        )
        .properties(width=WIDTH, height=HEIGHT)
    )
    all_groups = ends["groups"].sum()
    trainable = ends.filter(pl.col("end") == "trainable")["groups"].sum()
    return finish(
        bars,
        title,
        f"{trainable / all_groups:.0%} of {all_groups:,} groups; the others were paid for in vain",
    )


def staleness(run: Run) -> Any:
    """How stale trained groups were, and what that does to the loss."""
    title = "Staleness: how old what was trained on was, and what that did"
    lags = loop.staleness(run)
    if lags.is_empty():
        return nothing(title, "No answers of trained groups are on disk in this run.")
    bars = (
        alt.Chart(lags)
        .mark_bar(color=BLUE)
        .encode(
            x=alt.X("lag:O", axis=alt.Axis(title="lag (optimizer steps)", labelAngle=0)),
            y=alt.Y("share:Q", **percent("share of trained groups")),
            tooltip=["lag", "groups", alt.Tooltip("share", format=".0%")],
        )
        .properties(width=150, height=HEIGHT, title="trained groups by lag")
    )
    panels = [bars, *_by_age(run.steps)]
    return finish(
        alt.hconcat(*panels, spacing=40).resolve_scale(color="shared"),
        title,
        "It hurts where old tokens are clipped or the effective sample size falls",
    )


def _by_age(steps: pl.DataFrame) -> list[Any]:
    """Clipped share of tokens by their age; effective sample size of the batch."""
    panels = []
    clipped = loop.by_age(steps).filter(pl.col("measure") == "clipped_fraction")
    if not clipped.is_empty():
        panels.append(
            alt.Chart(clipped.with_columns(pl.format("age {}", "age")))
            .mark_line()
            .encode(
                x=alt.X("step:Q", axis=steps_axis()),
                y=alt.Y("value:Q", axis=alt.Axis(title="share of tokens", format=".1%")),
                color=alt.Color(
                    "age:N", scale=alt.Scale(range=SERIES), legend=alt.Legend(title=None)
                ),
                strokeDash=alt.StrokeDash("age:N", legend=None),
                tooltip=["step", "age", "value"],
            )
            .properties(width=210, height=HEIGHT, title="clipped tokens by age")
        )
    if "learner/ess" in steps.columns:
        panels.append(
            alt.Chart(steps.select("step", pl.col("learner/ess").alias("ess")).drop_nulls())
            .mark_line(color=BLUE)
            .encode(
                x=alt.X("step:Q", axis=steps_axis()),
                y=alt.Y("ess:Q", **percent("share of the batch")),
                tooltip=["step", "ess"],
            )
            .properties(width=210, height=HEIGHT, title="effective sample size")
        )
    return panels


def idle_shares(run: Run) -> Any:
    """Which role waited for the other."""
    title = "Who waited: the learner for rollouts, or rollouts for the learner?"
    idle = loop.idle(run.steps)
    if idle.is_empty():
        return nothing(title, "No step of RL was recorded in this run.")
    roles = list(loop.ROLES.values())
    lines = (
        alt.Chart(idle)
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(
            x=alt.X("step_from:Q", axis=steps_axis()),
            y=alt.Y("share:Q", **percent("share of the time")),
            color=alt.Color(
                "role:N",
                scale=alt.Scale(domain=roles, range=[VERMILION, BLUE]),
                legend=alt.Legend(title=None, orient="bottom"),
            ),
            strokeDash=alt.StrokeDash("role:N", scale=alt.Scale(domain=roles), legend=None),
            tooltip=["step_from", "role", alt.Tooltip("share", format=".0%")],
        )
        .properties(width=WIDTH, height=HEIGHT * 0.8)
    )
    parts = [
        f"{words}: {share:.0%}"
        for name, words in loop.ROLES.items()
        if (share := loop.over_time(run.steps, name)) is not None
    ]
    return finish(lines, title, "Of the whole time: " + "; ".join(parts))


def where_prompts_went(run: Run) -> Any:
    """What became of every prompt that RL could draw, by domain."""
    title = "Where the prompts went"
    fates = run.prompts.drop_nulls("fate").with_columns(pl.col("domain").fill_null("unknown"))
    if fates.is_empty() or run.draws.is_empty():
        return nothing(title, "Nothing was drawn in this run.")
    counted = (
        fates.group_by("domain", "fate")
        .agg(pl.len().alias("prompts"))
        .with_columns(
            pl.col("fate")
            .replace_strict(FATES, list(range(len(FATES))), return_dtype=pl.Int64)
            .alias("place")
        )
    )
    there = [fate for fate in FATES if fate in set(counted["fate"])]
    bars = (
        alt.Chart(counted)
        .mark_bar()
        .encode(
            x=alt.X("sum(prompts):Q", axis=alt.Axis(title="prompts that RL could draw")),
            y=alt.Y("domain:N", axis=alt.Axis(title=None)),
            color=alt.Color(
                "fate:N",
                sort=there,
                scale=alt.Scale(domain=there, range=[FATE_COLOURS[FATES.index(f)] for f in there]),
                legend=alt.Legend(title=None),
            ),
            order=alt.Order("place:Q"),
            tooltip=["domain", "fate", "prompts"],
        )
        .properties(width=WIDTH, height=alt.Step(24))
    )
    trained = run.prompts["num_trained"]
    return finish(
        bars,
        title,
        f"{(trained > 0).sum():,} of {len(fates):,} prompts were trained on,"
        f" {trained.sum():,} groups in all",
    )


def distillation_weights(run: Run) -> Any:
    """What the teacher's dynamic weights did over the steps."""
    title = "Weight of the teacher"
    weights = loop.distillation(run.steps)
    if weights.is_empty():
        return nothing(title, "No teacher took part in this run.")
    lines = (
        alt.Chart(weights)
        .mark_line()
        .encode(
            x=alt.X("step:Q", axis=alt.Axis(title="optimizer step", format="d")),
            y=alt.Y("value:Q", axis=alt.Axis(title=None)),
            color=alt.Color("weight:N", scale=alt.Scale(range=SERIES), legend=None),
            tooltip=["stage", "step", "weight", "value"],
        )
        .properties(width=220, height=110)
        .facet(alt.Facet("weight:N", header=alt.Header(title=None)), columns=3)
        .resolve_scale(y="independent")
    )
    return finish(lines, title, "λ falls as the student catches up")
