"""Two runs compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from inspect_runs import write_evaluation, write_known_run

from posttrain.inspect import Run, load_run
from posttrain.inspect.compare import Difference, compare, last_common_stage, unpaired_difference


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Run, Run]:
    found = []
    for name, right in (("first", {"h1": 1, "h2": 1}), ("second", {"h1": 2, "h2": 3})):
        run = write_known_run(tmp_path / name)
        write_evaluation(run, "rl", right)
        found.append(load_run(run.path))
    return found[0], found[1]


def by_metric(differences: list[Difference]) -> dict[tuple[str, str], Difference]:
    return {(d.metric, d.domain): d for d in differences}


def test_held_out_figures_are_paired_over_prompts(runs: tuple[Run, Run]) -> None:
    assert last_common_stage(*runs) == "rl"
    found = by_metric(compare(*runs))
    accuracy = found["pass@1", "all"]
    assert (accuracy.first, accuracy.second) == (0.25, 0.625)
    # Of two pairs .25 and .5 the mean lies between them in every resample.
    estimate = accuracy.difference
    assert (estimate.mean, estimate.low, estimate.high) == (0.375, 0.25, 0.5)
    assert accuracy.is_clear
    assert accuracy.over == "2 prompts, paired"
    assert found["pass@1", "sums"].difference.mean == 0.25
    # pass@2 of 1, 2 and 3 of 4 is 1/2, 5/6 and 1.
    assert found["pass@2", "all"].difference.mean == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert found["greedy", "all"].difference.mean == 1.0
    assert not found["tokens", "all"].is_clear
    assert ("pass@2", "sums") not in found


def test_loops_are_compared_over_groups_and_steps(runs: tuple[Run, Run]) -> None:
    first, second = runs
    worse = second.draws.with_columns(
        pl.when(pl.col("draw_id") == "d1-0")
        .then(pl.lit("errored"))
        .otherwise(pl.col("outcome"))
        .alias("outcome")
    )
    slower = second.steps.with_columns(pl.col("step_s") * 3)
    found = by_metric(compare(first, replace(second, draws=worse, steps=slower)))
    signal = found["share of groups that could be trained on", "all"]
    assert (signal.first, signal.second) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert signal.over == "3 and 3 groups"
    seconds = found["seconds a step", "all"]
    assert (seconds.first, seconds.second, seconds.difference.mean) == (3.0, 9.0, 6.0)


def test_runs_on_other_prompts_are_resampled_apart(runs: tuple[Run, Run]) -> None:
    first, second = runs
    others = replace(
        second,
        evals=second.evals.with_columns(pl.format("other-{}", "prompt_id").alias("prompt_id")),
    )
    accuracy = by_metric(compare(first, others))["pass@1", "all"]
    assert accuracy.over == "2 and 2 prompts"
    assert accuracy.difference.mean == 0.375


def test_runs_without_a_common_stage_are_compared_by_their_loops(runs: tuple[Run, Run]) -> None:
    first, second = runs
    found = compare(first, replace(second, evals=second.evals.clear()))
    assert {d.domain for d in found} == {"all"}
    assert "pass@1" not in {d.metric for d in found}


def test_an_unpaired_interval_covers_what_normal_theory_says() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.normal(0, 1, 400), rng.normal(0.5, 2, 300)
    error = 1.96 * np.sqrt(first.var(ddof=1) / 400 + second.var(ddof=1) / 300)
    found = unpaired_difference(first, np.append(second, np.nan))
    assert found.mean == pytest.approx(second.mean() - first.mean())
    assert found.high - found.mean == pytest.approx(error, rel=0.1)
    assert found.mean - found.low == pytest.approx(error, rel=0.1)
