"""Charts of difficulty: what screening found, what was drawn, what moved."""

from __future__ import annotations

from typing import Any

import altair as alt
import polars as pl

from curricula.buckets import BUCKETS
from posttrain.inspect import difficulty
from posttrain.inspect.charts.look import (
    BLUE,
    DIFFICULTY,
    GREY,
    HEIGHT,
    ORANGE,
    SHAPES,
    SKY,
    VERMILION,
    WIDTH,
    finish,
    nothing,
    percent,
    rectangle_of_window,
    steps_axis,
)
from posttrain.inspect.run import Run
from posttrain.inspect.windows import last_of_windows
from posttrain.types import Action

ACTIONS = {"keep": BLUE, "drop": ORANGE, "retest": SKY, difficulty.UNDECIDED: GREY}
KEPT = "kept"
HARD_FIRST = "hard prompts are dark"


def pass_rate_histogram(run: Run) -> Any:
    """Prompts by the pass rate that screening found, the ends 0 and 1 apart, by what was kept."""
    title = "Prompts by pass rate in screening, and what selection kept"
    bins = difficulty.pass_rate_bins(run.verdicts, run.prompts)
    if bins.is_empty():
        return nothing(title, "No prompt was screened in this run.")
    shown = [action for action in ACTIONS if action in set(bins["action"])]
    bars = (
        alt.Chart(bins)
        .mark_bar()
        .encode(
            x=alt.X(
                "bin:N",
                sort=list(difficulty.RATE_BINS),
                scale=alt.Scale(domain=list(difficulty.RATE_BINS)),
                axis=alt.Axis(
                    title="share of right answers (0: never right, 1: always right)", labelAngle=0
                ),
            ),
            y=alt.Y("sum(prompts):Q", axis=alt.Axis(title="prompts", tickMinStep=1)),
            color=alt.Color(
                "action:N",
                sort=shown,
                scale=alt.Scale(domain=shown, range=[ACTIONS[a] for a in shown]),
                legend=alt.Legend(title="selection for SFT"),
            ),
            tooltip=["bin:N", "action:N", "prompts:Q"],
        )
        .properties(width=WIDTH, height=HEIGHT)
    )
    ends = bins.group_by("bin").agg(pl.col("prompts").sum())
    share = {b: n / bins["prompts"].sum() for b, n in ends.iter_rows()}
    return finish(
        bars,
        title,
        f"{bins['prompts'].sum():,} prompts; {share.get('0', 0):.0%} never solved,"
        f" {share.get('1', 0):.0%} always solved",
    )


def pruned_by_domain(run: Run) -> Any:
    """How much of each domain selection dropped, and how difficult that was."""
    title = "What was pruned: prompts by domain, the dropped ones by pass rate"
    decided = difficulty.pruned(run.verdicts, run.prompts).with_columns(
        pl.format("{}: {}", "stage", pl.col("rule").str.replace_all("_", " ")).alias("by"),
        pl.col("domain").fill_null("unknown"),
        dropped=pl.col("action") == str(Action.DROP),
    )
    if not decided["dropped"].any():
        return nothing(title, "Nothing was dropped in this run.")
    shown = decided.with_columns(
        pl.when("dropped").then("bucket").otherwise(pl.lit(KEPT)).alias("what"),
        pl.when("dropped").then("place").otherwise(-1).alias("place"),
    )
    names = [KEPT, *BUCKETS]
    bars = (
        alt.Chart(shown)
        .mark_bar()
        .encode(
            x=alt.X("sum(prompts):Q", axis=alt.Axis(title="prompts judged", tickMinStep=1)),
            y=alt.Y("domain:N", axis=alt.Axis(title=None)),
            color=alt.Color(
                "what:N",
                sort=names,
                scale=alt.Scale(domain=names, range=[GREY, *DIFFICULTY[: len(BUCKETS)]]),
                legend=alt.Legend(title="dropped, by pass rate"),
            ),
            order=alt.Order("place:Q", sort="descending"),
            column=alt.Column(
                "by:N",
                sort=decided["by"].unique(maintain_order=True).to_list(),
                header=alt.Header(title=None),
            ),
            tooltip=["by", "domain", "what", "prompts"],
        )
        .properties(width=WIDTH / 2, height=alt.Step(20))
    )
    sums = decided.group_by("by", maintain_order=True).agg(
        pl.col("prompts").filter("dropped").sum().alias("dropped"), pl.col("prompts").sum()
    )
    told = "; ".join(f"{by}, {dropped:,} of {of:,}" for by, dropped, of in sums.iter_rows())
    return finish(bars.resolve_scale(x="independent"), title, told)


def difficulty_by_step(run: Run) -> Any:
    """How hard the drawn groups proved to be, step by step."""
    title = "Difficulty of what was drawn, as its groups were answered"
    drawn = difficulty.drawn_difficulty(run.draws)
    if drawn.is_empty():
        return nothing(title, "No draw was answered in this run.")
    tiles = (
        alt.Chart(drawn)
        .mark_rect()
        .encode(
            **rectangle_of_window(),
            y=alt.Y(
                "bucket:N",
                sort=list(reversed(BUCKETS)),
                scale=alt.Scale(domain=list(reversed(BUCKETS))),
                axis=alt.Axis(title="share of right answers in the group"),
            ),
            color=alt.Color(
                "share:Q",
                scale=alt.Scale(scheme="blues", domain=[0, max(drawn["share"])]),
                legend=alt.Legend(title="share of groups", format=".0%"),
            ),
            tooltip=["step_from", "bucket", "groups", alt.Tooltip("share", format=".0%")],
        )
        .properties(width=WIDTH, height=HEIGHT * 0.75)
    )
    return finish(
        tiles, title, "Top and bottom rows (all right, none right) carry no signal for training"
    )


def bucket_moves(run: Run) -> Any:
    """Where prompts moved between their verdict before a re-screening and that of it."""
    title = "Re-screening: where prompts were before, and where they are now"
    moves = difficulty.bucket_moves(run.verdicts)
    if moves.is_empty():
        return nothing(title, "No prompt was judged again in this run.")
    named = moves.with_columns(
        pl.col("before", "after").replace_strict(
            list(range(len(BUCKETS))), list(BUCKETS), return_dtype=pl.String
        ),
        pl.format("judged after step {}", "step").alias("when"),
    )
    base = alt.Chart(named).encode(
        x=alt.X(
            "after:N",
            scale=alt.Scale(domain=list(BUCKETS)),
            axis=alt.Axis(title="pass rate now", labelAngle=-45),
        ),
        y=alt.Y(
            "before:N",
            scale=alt.Scale(domain=list(reversed(BUCKETS))),
            axis=alt.Axis(title="pass rate when last judged"),
        ),
        tooltip=["when", "before", "after", "prompts"],
    )
    most = int(named["prompts"].max())  # type: ignore[arg-type]
    tiles = base.mark_rect().encode(
        color=alt.Color(
            "prompts:Q",
            scale=alt.Scale(scheme="blues", domain=[0, most]),
            legend=alt.Legend(title="prompts", tickMinStep=1, format="d"),
        )
    )
    counts = base.mark_text(fontSize=11).encode(
        text="prompts:Q",
        color=alt.condition(alt.datum.prompts > most * 0.6, alt.value("white"), alt.value("black")),
    )
    order = [f"judged after step {step}" for step in moves["step"].unique().sort()]
    facets = (
        alt.layer(tiles, counts)
        .properties(width=170, height=170)
        .facet(alt.Facet("when:N", sort=order, header=alt.Header(title=None)), columns=4)
    )
    return finish(facets, title, "Right of the diagonal from bottom left: has become easier")


def pool_by_bucket(run: Run) -> Any:
    """The curriculum's pool by difficulty over the steps, all domains together."""
    title = "Prompts of the curriculum by difficulty"
    cells = last_of_windows(difficulty.pool(run.steps))
    if cells.is_empty():
        return nothing(title, "The curriculum of this run keeps no track of difficulty.")
    total = cells.group_by("step", "place", "bucket").agg(pl.col("prompts").sum())
    domain = list(difficulty.POOL)
    areas = (
        alt.Chart(total.sort("step", "place"))
        .mark_area(interpolate="step-after")
        .encode(
            x=alt.X("step:Q", axis=steps_axis(), scale=alt.Scale(nice=False)),
            y=alt.Y(
                "prompts:Q",
                stack="zero",
                axis=alt.Axis(title="prompts"),
                scale=alt.Scale(nice=False),
            ),
            color=alt.Color(
                "bucket:N",
                sort=domain,
                scale=alt.Scale(domain=domain, range=DIFFICULTY),
                legend=alt.Legend(title="remembered pass rate"),
            ),
            order=alt.Order("place:Q"),
            tooltip=["step", "bucket", "prompts"],
        )
        .properties(width=WIDTH, height=HEIGHT)
    )
    return finish(areas, title, f"{HARD_FIRST.capitalize()}; dropped: re-screening found them easy")


def calibration(run: Run) -> Any:
    """The judge's estimate against what the policy later did."""
    title = "Judged pass rate against what the policy did when RL first drew the prompt"
    points = difficulty.calibration(run.verdicts, run.prompts, run.draws)
    if points.is_empty():
        return nothing(title, "No screened prompt was drawn in this run.")
    periods = ["first third", "last third"]
    base = alt.Chart(points).encode(
        x=alt.X("judged:Q", **percent("pass rate in screening")),
        color=alt.Color(
            "period:N",
            scale=alt.Scale(domain=periods, range=[BLUE, VERMILION]),
            legend=alt.Legend(title="of the steps"),
        ),
    )
    marks = base.mark_point(filled=True, opacity=1).encode(
        y=alt.Y("later:Q", **percent("pass rate when drawn")),
        size=alt.Size(
            "prompts:Q",
            scale=alt.Scale(range=[20, 220]),
            legend=alt.Legend(title="prompts", tickCount=3, format="d"),
        ),
        shape=alt.Shape("period:N", scale=alt.Scale(domain=periods, range=SHAPES[:2])),
        tooltip=["period", "bucket", "judged", "later", "low", "high", "prompts"],
    )
    ranges = base.mark_rule().encode(y="low:Q", y2="high:Q")
    diagonal = (
        alt.Chart(pl.DataFrame({"judged": [0, 1], "later": [0, 1]}))
        .mark_line(color=GREY, strokeDash=[4, 4])
        .encode(x="judged:Q", y="later:Q")
    )
    return finish(
        alt.layer(diagonal, ranges, marks).properties(width=HEIGHT * 1.3, height=HEIGHT * 1.3),
        title,
        "On the diagonal the judge was right; above it the policy has become better since",
        f"95% intervals over prompts, where there are at least {difficulty.ENOUGH}",
    )
