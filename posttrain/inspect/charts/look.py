"""How charts look: colours that colour-blind people tell apart, titles that say what is shown."""

from __future__ import annotations

from typing import Any

import altair as alt

# Okabe and Ito (2008): told apart with every common colour vision deficiency.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#BBBBBB"

# Light to dark in equal steps of lightness (viridis): hard prompts are dark.
DIFFICULTY = ["#440154", "#414487", "#2A788E", "#22A884", "#7AD151", "#FDE725", GREY]

SERIES = [BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK, YELLOW]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]

STAGES = ["start", "sft", "rl", "dpo"]
STAGE_COLOURS = [GREY, SKY, BLUE, ORANGE]
STAGE_SHAPES = ["circle", "triangle-up", "square", "diamond"]

WIDTH, HEIGHT = 520, 240


def finish(chart: Any, title: str, *subtitle: str) -> Any:
    """The whole chart with its title; nothing can be laid over it afterwards."""
    return (
        chart.properties(
            title=alt.Title(title, subtitle=list(subtitle), anchor="start", frame="group")
        )
        .configure_view(stroke=None)
        .configure_axis(
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
            gridOpacity=0.5,
            labelLimit=220,
        )
        .configure_header(labelFontSize=12, titleFontSize=12)
        .configure_legend(labelFontSize=12, titleFontSize=12, labelLimit=320, symbolLimit=20)
        .configure_title(fontSize=15, subtitleFontSize=12, subtitleColor="#555555", offset=12)
    )


def nothing(title: str, why: str) -> Any:
    """In place of a chart for which the run has no data."""
    text = alt.Chart(alt.Data(values=[{"text": why}])).mark_text(fontSize=13, color="#555555")
    return finish(text.encode(text="text:N").properties(width=WIDTH, height=60), title)


def percent(title: str, **axis: Any) -> dict[str, Any]:
    """Axis and scale of a share between 0 and 1."""
    return {
        "axis": alt.Axis(format=".0%", title=title, **axis),
        "scale": alt.Scale(domain=[0, 1]),
    }


def steps_axis() -> alt.Axis:
    return alt.Axis(title="optimizer step of RL", format="d", tickMinStep=1)


def rectangle_of_window() -> dict[str, Any]:
    """Encodings of a bar from `step_from` to `step_to`."""
    from_first = alt.Scale(nice=False, zero=False)
    return {
        "x": alt.X("step_from:Q", axis=steps_axis(), scale=from_first),
        "x2": alt.X2("step_to:Q"),
    }
