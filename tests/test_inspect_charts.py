"""Each chart as a reader gets it: what its title says, what it draws, in which colours."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from inspect_runs import write_known_run, write_long_run

from posttrain.inspect import Run, charts, load_run
from posttrain.inspect.charts import look
from posttrain.inspect.columns import FRAMES
from posttrain.inspect.windows import window_means

Chart = Callable[[Run], Any]
ALL: list[Chart] = [getattr(charts, name) for name in charts.__all__]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load_run(write_known_run(tmp_path_factory.mktemp("charts") / "known").path)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load_run(write_long_run(tmp_path_factory.mktemp("charts") / "long", last_step=750))


@pytest.fixture(scope="module")
def empty(run: Run) -> Run:
    frames = {name: frame.empty() for name, frame in FRAMES.items()}
    return replace(run, **frames | {"answers": frames["answers"].lazy()})


def drawn(chart: Any) -> list[list[dict[str, Any]]]:
    """The data sets of a chart."""
    return list(chart.to_dict()["datasets"].values())


def encodings(spec: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every channel of every layer and panel."""
    if isinstance(spec, dict):
        for channel, definition in spec.get("encoding", {}).items():
            for one in definition if isinstance(definition, list) else [definition]:
                yield channel, one
        for part in spec.values():
            yield from encodings(part)
    elif isinstance(spec, list):
        for part in spec:
            yield from encodings(part)


@pytest.mark.parametrize("chart", ALL, ids=lambda c: c.__name__)
def test_has_a_title_and_says_so_where_there_is_nothing_to_show(
    chart: Chart, run: Run, empty: Run
) -> None:
    title = chart(run).to_dict()["title"]["text"]
    spec = chart(empty).to_dict()
    assert spec["title"]["text"] == title
    assert len(title) > 15
    assert spec["mark"]["type"] == "text"
    (words,) = spec["data"]["values"]
    assert words["text"].endswith(".")


@pytest.mark.parametrize("chart", ALL, ids=lambda c: c.__name__)
def test_positions_have_titles_or_speak_for_themselves(chart: Chart, run: Run) -> None:
    for channel, definition in encodings(chart(run).to_dict()):
        if channel in ("x", "y") and definition.get("type") == "quantitative":
            shared = {"low", "mean", "later", "judged"}  # a layer over one that has the title
            named = definition.get("axis", {}).get("title")
            assert named or definition.get("title") or definition["field"] in shared, definition


@pytest.mark.parametrize("chart", ALL, ids=lambda c: c.__name__)
def test_categories_are_coloured_for_everyone(chart: Chart, run: Run) -> None:
    told_apart = {*look.SERIES, *look.DIFFICULTY, look.GREY}
    for channel, definition in encodings(chart(run).to_dict()):
        if channel != "color" or definition.get("type") != "nominal":
            continue
        assert set(definition["scale"]["range"]) <= told_apart


def luminance(colour: str) -> float:
    """Relative luminance of sRGB (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_difficulty_is_told_by_lightness_alone() -> None:
    shades = [luminance(colour) for colour in look.DIFFICULTY[:-1]]
    assert shades == sorted(shades)
    assert min(b - a for a, b in itertools.pairwise(shades)) > 0.03


def test_the_histogram_draws_what_screening_found(run: Run) -> None:
    spec = charts.pass_rate_histogram(run).to_dict()
    assert spec["title"]["subtitle"] == ["4 prompts; 25% never solved, 25% always solved"]
    (rows,) = drawn(charts.pass_rate_histogram(run))
    assert {(r["bin"], r["action"]): r["prompts"] for r in rows} == {
        ("0", "no selection"): 1,
        (".2–.3", "no selection"): 1,
        (".5–.6", "keep"): 1,
        ("1", "drop"): 1,
    }


def test_where_the_prompts_went(run: Run) -> None:
    chart = charts.where_prompts_went(run)
    assert chart.to_dict()["title"]["subtitle"] == [
        "2 of 4 prompts were trained on, 2 groups in all"
    ]
    (rows,) = drawn(chart)
    assert {(r["domain"], r["fate"]): r["prompts"] for r in rows} == {
        ("sums", "pruned"): 1,
        ("sums", "trained"): 1,
        ("words", "no signal"): 1,
        ("words", "trained"): 1,
    }


def test_the_share_of_groups_with_signal(run: Run) -> None:
    subtitle = charts.trainable_share(run).to_dict()["title"]["subtitle"]
    assert subtitle == ["67% of 3 groups; the others were paid for in vain"]


def test_accuracy_names_the_hardest_domain_and_draws_its_interval(run: Run) -> None:
    chart = charts.domain_accuracy(run)
    assert chart.to_dict()["title"]["subtitle"] == ["Hardest after rl: words, 0.50 [0.38, 0.62]"]
    (rows,) = drawn(chart)
    assert len(rows) == 6
    assert {"all", "sums", "words"} == {r["domain"] for r in rows}


def test_runs_are_drawn_against_time_side_by_side(run: Run, tmp_path: Path) -> None:
    other = load_run(write_known_run(tmp_path / "other").path)
    (rows,) = drawn(charts.accuracy_by_time([run, other]))
    points = [(r["run"], r["minutes"], r["mean"]) for r in rows]
    of_each = [(10 / 60, 0.25), (17 / 60, 0.375), (35 / 60, 0.5)]
    assert points == [
        (name, pytest.approx(t), mean) for name in ("known", "other") for t, mean in of_each
    ]


def test_waiting_and_staleness_say_how_much_in_their_titles(run: Run) -> None:
    assert charts.idle_shares(run).to_dict()["title"]["subtitle"] == [
        "Of the whole time: learner waits for groups: 25%; engines without a request: 17%"
    ]
    lags = next(rows for rows in drawn(charts.staleness(run)) if "lag" in rows[0])
    assert [(r["lag"], r["share"]) for r in lags] == [(0, 0.5), (1, 0.5)]


def test_a_judge_that_was_measured_is_among_those_who_waited(run: Run) -> None:
    steps = run.steps.with_columns(pl.lit(0.5).alias("judge_idle_share"))
    chart = charts.idle_shares(replace(run, steps=steps)).to_dict()
    assert chart["title"]["subtitle"] == [
        "Of the whole time: learner waits for groups: 25%; engines without a request: 17%;",
        "judge without a prompt: 50%",
    ]
    assert chart["encoding"]["color"]["scale"]["domain"] == [
        "learner waits for groups",
        "engines without a request",
        "judge without a prompt",
    ]


def test_the_pool_adds_domains_up(run: Run) -> None:
    (rows,) = drawn(charts.pool_by_bucket(run))
    assert [(r["step"], r["bucket"], r["prompts"]) for r in rows] == [
        (2, "(0, .25]", 2),
        (2, "1", 1),
        (2, "dropped", 1),
    ]


@pytest.mark.parametrize("chart", ALL, ids=lambda c: c.__name__)
def test_a_long_run_draws_no_more_than_a_short_one(chart: Chart, long_run: Run) -> None:
    assert len(long_run.steps.filter(pl.col("stage") == "rl")) == 750
    assert sum(map(len, drawn(chart(long_run)))) <= 400  # of data that a page holds


def test_the_pool_of_a_long_run_is_that_at_first_and_at_the_end_of_each_window(
    long_run: Run,
) -> None:
    (rows,) = drawn(charts.pool_by_bucket(long_run))
    steps = sorted({r["step"] for r in rows})
    assert steps == [1, *range(19, 750, 19), 750]
    cells = long_run.steps.filter((pl.col("stage") == "rl") & (pl.col("step") == 38))
    solved = cells.select(pl.sum_horizontal("^pool/.*/1$")).item()
    assert [r["prompts"] for r in rows if r["step"] == 38 and r["bucket"] == "1"] == [solved]


def test_what_a_long_run_measured_in_each_step_is_averaged(long_run: Run) -> None:
    (rows,) = drawn(charts.distillation_weights(long_run))
    weights = {r["step_from"]: r["value"] for r in rows}
    assert list(weights) == list(range(1, 750, 19))
    assert weights[1] == pytest.approx(1 - 10 / 750)  # of steps 1 to 19
    by_age = next(rows for rows in drawn(charts.staleness(long_run)) if "age" in rows[0])
    assert {r["step_from"] for r in by_age} <= set(weights)


def test_each_stage_is_divided_into_windows_of_its_own() -> None:
    """A long SFT under a teacher leaves the few steps of RL after it to be seen."""
    steps = [("sft", step) for step in range(1, 2001)] + [("rl", step) for step in range(1, 41)]
    frame = pl.DataFrame(steps, schema=["stage", "step"], orient="row")
    means = window_means(frame.with_columns(pl.col("step").alias("value")), "stage")
    widths = means.with_columns((pl.col("step_to") - pl.col("step_from")).alias("width"))
    assert widths.group_by("stage").agg(pl.len(), pl.col("width").max()).sort("stage").rows() == [
        ("rl", 40, 1),
        ("sft", 40, 50),
    ]
