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
from posttrain.inspect.windows import window_means

END_COLOURS = [BLUE, YELLOW, PURPLE, ORANGE, VERMILION]
AGE_MEASURES = {
    "clipped_fraction": ("clipped tokens by age", "share of tokens", ".1%", 0.01),
    "k3": ("divergence by age", "k3 to the weights that wrote it (nats)", "~g", 1e-3),
}
"""What the learner reports by age: title, axis, format, and the least that the axis spans."""
ROLE_COLOURS = [VERMILION, BLUE, ORANGE, PURPLE]
FATE_COLOURS = [BLUE, SKY, PURPLE, YELLOW, ORANGE, VERMILION, BLACK, GREY]


def trainable_share(run: Run) -> Any:
    """Which share of the groups carried a signal, and why the others did not."""
    title = "Share of groups that could be trained on"
    ends = loop.group_ends(run.draws)
    if ends.is_empty():
        return nothing(title, "No draw has ended in this run.")
    there = [end for end in loop.ENDS if end in set(ends["end"])]
    bars = (
        alt.Chart(ends)
        .mark_rect()
        .encode(
            **rectangle_of_window(),
            y=alt.Y("below:Q", **percent("share of groups")),
            y2="above:Q",
            color=alt.Color(
                "end:N",
                sort=there,
                scale=alt.Scale(
                    domain=there, range=[END_COLOURS[loop.ENDS.index(end)] for end in there]
                ),
                legend=alt.Legend(title="group"),
            ),
            tooltip=["step_from", "end", "groups", alt.Tooltip("share", format=".0%")],
        )
        .properties(width=WIDTH, height=HEIGHT)
    )
    all_groups = int(ends["groups"].sum())
    trainable = int(ends.filter(pl.col("end") == "trainable")["groups"].sum())
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
        .properties(width=110, height=HEIGHT, title="trained groups by lag")
    )
    panels = [bars, *_sample_size(run.steps), *_by_age(run.steps)]
    return finish(
        alt.hconcat(*panels, spacing=25),
        title,
        "It hurts where old tokens are clipped or the effective sample size falls",
    )


def _sample_size(steps: pl.DataFrame) -> list[Any]:
    if "learner/ess" not in steps.columns:
        return []
    measured = steps.select("step", pl.col("learner/ess").alias("value")).drop_nulls()
    return [
        alt.Chart(window_means(measured).rename({"value": "ess"}))
        .mark_line(color=BLUE)
        .encode(
            x=alt.X("step_from:Q", axis=steps_axis()),
            y=alt.Y("ess:Q", **percent("share of the batch")),
            tooltip=["step_from", "ess"],
        )
        .properties(width=150, height=HEIGHT, title="effective sample size")
    ]


def _by_age(steps: pl.DataFrame) -> list[Any]:
    """Clipped share of the tokens, and divergence from the weights that wrote them, by age."""
    measured = window_means(loop.by_age(steps), "measure", "age").with_columns(
        pl.format("age {}", "age").alias("tokens of")
    )
    panels = []
    for measure, (title, axis, form, least) in AGE_MEASURES.items():
        of_it = measured.filter(pl.col("measure") == measure)
        if of_it.is_empty():
            continue
        most = of_it["value"].max()
        assert isinstance(most, float)
        panels.append(
            alt.Chart(of_it)
            .mark_line()
            .encode(
                x=alt.X("step_from:Q", axis=steps_axis()),
                y=alt.Y(
                    "value:Q",
                    axis=alt.Axis(title=axis, format=form),
                    scale=alt.Scale(domain=[0, max(most, least)]),
                ),
                color=alt.Color(
                    "tokens of:N",
                    scale=alt.Scale(range=SERIES),
                    legend=alt.Legend(orient="bottom", title=None),
                ),
                strokeDash=alt.StrokeDash("tokens of:N", legend=None),
                tooltip=["step_from", "tokens of", "value"],
            )
            .properties(width=150, height=HEIGHT, title=title)
        )
    return panels


def idle_shares(run: Run) -> Any:
    """Which roles waited for the others."""
    title = "Who waited: the learner for rollouts, or rollouts for the learner?"
    idle = loop.idle(run.steps)
    if idle.is_empty():
        return nothing(title, "No step of RL was recorded in this run.")
    measured = set(idle["role"])
    colours = {
        words: colour
        for words, colour in zip(loop.ROLES.values(), ROLE_COLOURS, strict=True)
        if words in measured
    }
    roles = list(colours)
    lines = (
        alt.Chart(idle)
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(
            x=alt.X("step_from:Q", axis=steps_axis(), scale=alt.Scale(nice=False, zero=False)),
            y=alt.Y("share:Q", **percent("share of the time")),
            color=alt.Color(
                "role:N",
                scale=alt.Scale(domain=roles, range=list(colours.values())),
                legend=alt.Legend(title=None, orient="bottom", columns=2),
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
    others = "; ".join(parts[2:])  # a line of its own, so that the chart grows no wider
    said = "Of the whole time: " + "; ".join(parts[:2])
    return finish(lines, title, *([f"{said};", others] if others else [said]))


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
    weights = window_means(loop.distillation(run.steps), "stage", "weight")
    if weights.is_empty():
        return nothing(title, "No teacher took part in this run.")
    lines = (
        alt.Chart(weights)
        .mark_line()
        .encode(
            x=alt.X("step_from:Q", axis=alt.Axis(title="optimizer step", format="d")),
            y=alt.Y("value:Q", axis=alt.Axis(title=None)),
            color=alt.Color("weight:N", scale=alt.Scale(range=SERIES), legend=None),
            tooltip=["stage", "step_from", "weight", "value"],
        )
        .properties(width=220, height=110)
        .facet(alt.Facet("weight:N", header=alt.Header(title=None)), columns=3)
        .resolve_scale(y="independent")
    )
    return finish(lines, title, "λ falls as the student catches up")
