"""What the charts show, by hand: difficulty, signal, staleness, waiting, findings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from inspect_runs import write_known_run

from curricula.buckets import BUCKETS, bucket_of
from posttrain.inspect import Run, difficulty, load_run, loop
from posttrain.inspect.columns import DRAWS, PROMPTS, STEPS, VERDICTS
from posttrain.inspect.findings import Finding, bound, findings
from posttrain.inspect.windows import add_windows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load_run(write_known_run(tmp_path_factory.mktemp("figures") / "known").path)


NOT_KEPT = PROMPTS.empty()
"""Prompts of a run without a table of them."""


def verdicts(*rows: dict[str, Any]) -> pl.DataFrame:
    full = [
        {"pass_rate": row["num_correct"] / row["num_samples"] if row["num_samples"] else None} | row
        for row in rows
    ]
    return pl.DataFrame(full, schema=VERDICTS.schema)


def judged(prompt_id: str, correct: int, of: int, step: int | None = None, **more: Any) -> Any:
    return {"prompt_id": prompt_id, "num_correct": correct, "num_samples": of, "step": step} | more


def draws(*rows: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema=DRAWS.schema)


def drawn(
    prompt_id: str, step: int | None, right: int, of: int = 4, outcome: str = "trained", **more: Any
) -> dict[str, Any]:
    counts = {"num_correct": right, "num_scored": of}
    return {"prompt_id": prompt_id, "step": step, "outcome": outcome} | counts | more


def test_the_ends_of_the_histogram_stand_apart() -> None:
    bins = difficulty.pass_rate_bins(
        verdicts(
            judged("p0", 0, 8, action="keep"),
            judged("p1", 1, 10, action="keep"),  # .1 counts in .1–.2
            judged("p2", 7, 10, action="drop"),
            judged("p3", 19, 20),
            judged("p4", 8, 8, action="drop"),
            judged("p5", 0, 8),  # of a screening that was interrupted: done again, it counts
            judged("p5", 8, 8, action="drop"),
            judged("p6", 0, 8, step=10),  # re-screening
            judged("p7", 0, 0),  # nothing was scored
        ),
        NOT_KEPT,
    )
    assert bins.rows() == [
        (0, "0", "keep", 1),
        (2, ".1–.2", "keep", 1),
        (8, ".7–.8", "drop", 1),
        (10, ".9–1", "no selection", 1),
        (11, "1", "drop", 2),
    ]


def test_buckets_are_those_of_the_curriculum() -> None:
    rates = np.array([0.0, 0.01, 0.25, 0.26, 0.5, 0.75, 0.99, 1.0])
    place = difficulty.bucket_place(pl.col("rate")).alias("place")
    places = pl.DataFrame({"rate": rates}).select(place)["place"]
    assert places.to_list() == bucket_of(rates).tolist()


def test_what_was_pruned_by_stage_rule_and_pass_rate() -> None:
    drop = {"stage": "sft", "rule": "easy", "action": "drop", "domain": "a"}
    found = difficulty.pruned(
        verdicts(
            judged("p0", 6, 8, **drop),
            judged("p1", 7, 8, **drop),
            judged("p2", 8, 8, **drop),
            judged("p3", 0, 8, **drop | {"action": "keep"}),
            judged("p2", 8, 8, step=5, stage="rl", rule="re-screening", action="drop"),
            judged("p2", 3, 8, step=9, stage="rl", rule="re-screening", action="keep"),
        ),
        NOT_KEPT,
    )
    names = ("stage", "domain", "bucket", "action", "prompts", "lowest", "highest")
    assert found.select(names).rows() == [
        ("sft", "a", "0", "keep", 1, 0.0, 0.0),
        ("sft", "a", "(.5, .75]", "drop", 1, 0.75, 0.75),
        ("sft", "a", "(.75, 1)", "drop", 1, 0.875, 0.875),
        ("sft", "a", "1", "drop", 1, 1.0, 1.0),
        ("rl", None, "(.25, .5]", "keep", 1, 0.375, 0.375),
    ]


def kept(**sets: str) -> pl.DataFrame:
    """A run's prompts, each with the names of its sets; `none`: known to the ledger alone."""
    rows = [
        {"prompt_id": p} | {name: name in words for name in ("in_train", "in_held_out", "in_sft")}
        if words != "none"
        else {"prompt_id": p}
        for p, words in sets.items()
    ]
    return pl.DataFrame(rows, schema=PROMPTS.schema)


def test_what_a_screening_of_other_data_found_does_not_count() -> None:
    drop = {"stage": "sft", "rule": "easy", "action": "drop"}
    found = verdicts(
        judged("both", 8, 8, **drop),
        judged("now only train", 6, 8, **drop),
        judged("gone", 4, 8, **drop),
        judged("gone", 4, 8, step=5, stage="rl", rule="re-screening", action="drop"),
        judged("held out", 8, 8, **drop),
        judged("train", 0, 8),
    )
    now = kept(
        **{"both": "in_train in_sft", "now only train": "in_train", "train": "in_train"},
        **{"gone": "none", "held out": "in_held_out"},
    )
    names = ("stage", "lowest", "prompts")
    assert difficulty.pruned(found, now).select(names).rows() == [("sft", 1.0, 1), ("rl", 0.5, 1)]
    judged_now = difficulty.screened(found, now)["prompt_id"].to_list()
    assert judged_now == ["both", "now only train", "train"]
    assert difficulty.pruned(found, NOT_KEPT)["prompts"].sum() == 5
    assert len(difficulty.screened(found, NOT_KEPT)) == 5


def test_steps_share_windows_when_there_are_many() -> None:
    windows = add_windows(pl.DataFrame({"step": [1, 3, 4, 10]}), columns=4)
    assert windows.rows() == [(1, 1, 4), (3, 1, 4), (4, 4, 7), (10, 10, 13)]


def test_difficulty_of_what_was_drawn_by_step() -> None:
    found = difficulty.drawn_difficulty(
        draws(
            *(drawn("a", 1, 0), drawn("b", 1, 1), drawn("c", 1, 1), drawn("d", 2, 4)),
            drawn("e", 2, 0, of=0, outcome="errored"),
            drawn("f", None, 2, outcome="in_flight"),
        )
    )
    assert found.select("step_from", "bucket", "groups", "share").rows() == [
        (1, "0", 1, pytest.approx(1 / 3)),
        (1, "(0, .25]", 2, pytest.approx(2 / 3)),
        (2, "1", 1, 1.0),
    ]


def test_moves_go_from_the_verdict_before_to_the_one_now() -> None:
    moved = difficulty.bucket_moves(
        verdicts(
            *(judged("a", 0, 8), judged("b", 4, 8), judged("c", 8, 8)),
            *(judged("a", 4, 8, step=5), judged("b", 6, 8, step=5)),
            *(judged("a", 8, 8, step=10), judged("new", 8, 8, step=10)),
        )
    )
    names = [(step, BUCKETS[before], BUCKETS[after], n) for step, before, after, n in moved.rows()]
    assert names == [
        (5, "0", "(.25, .5]", 1),
        (5, "(.25, .5]", "(.5, .75]", 1),
        (10, "(.25, .5]", "1", 1),  # what nobody had judged before did not move
    ]


def test_of_many_re_screenings_a_few_are_shown_the_last_among_them() -> None:
    rows = [judged("a", 4, 8), *(judged("a", 4, 8, step=step) for step in range(10, 110, 10))]
    assert difficulty.bucket_moves(verdicts(*rows), most=4)["step"].to_list() == [10, 40, 70, 100]


def test_pool_cells_are_read_whatever_the_domain_is_called() -> None:
    steps = pl.DataFrame({"step": [1, 2], "pool/a/b/(0, .25]": [3.0, 2.0], "pool/c/dropped": 1.0})
    assert difficulty.pool(steps).rows() == [
        (1, "a/b", 1, "(0, .25]", 3),
        (1, "c", 6, "dropped", 1),
        (2, "a/b", 1, "(0, .25]", 2),
        (2, "c", 6, "dropped", 1),
    ]


def test_calibration_takes_first_draws_of_the_first_and_the_last_third() -> None:
    judgements = verdicts(*(judged(p, 2, 8) for p in "abcd"), judged("e", 8, 8))
    found = difficulty.calibration(
        judgements,
        NOT_KEPT,
        draws(
            *(drawn("a", 1, 0), drawn("b", 3, 2), drawn("c", 4, 4), drawn("d", 9, 3)),
            *(drawn("a", 9, 4), drawn("unjudged", 1, 4), drawn("e", 2, 4)),
        ),
    )
    early, always, late = found.rows(named=True)
    assert (early["period"], early["bucket"], early["prompts"]) == ("first third", "(0, .25]", 2)
    assert (early["judged"], early["later"]) == (0.25, 0.25)
    assert (early["low"], early["high"]) == (None, None)
    assert (always["bucket"], always["later"]) == ("1", 1.0)
    assert (late["period"], late["later"], late["prompts"]) == ("last third", 0.75, 1)


def test_the_last_third_is_of_all_steps_not_of_those_that_drew_a_prompt_first() -> None:
    found = difficulty.calibration(
        verdicts(judged("a", 2, 8), judged("b", 2, 8)),
        NOT_KEPT,
        draws(
            *(drawn("a", 1, 1), drawn("b", 3, 2)),  # then all were known
            *(drawn("a", step, 4) for step in range(4, 10)),
        ),
    )
    assert found.select("period", "later", "prompts").rows() == [("first third", 0.375, 2)]


def test_calibration_has_intervals_where_there_are_enough_prompts() -> None:
    rights = [0, 1, 2, 2, 3]
    found = difficulty.calibration(
        verdicts(*(judged(f"p{i}", 2, 8) for i in range(5)), judged("late", 2, 8)),
        NOT_KEPT,
        draws(*(drawn(f"p{i}", 1, right) for i, right in enumerate(rights)), drawn("late", 9, 4)),
    ).row(0, named=True)
    half = 1.96 * np.std(np.array(rights) / 4, ddof=1) / np.sqrt(5)
    assert (found["low"], found["high"]) == (pytest.approx(0.4 - half), pytest.approx(0.4 + half))


def test_shares_of_groups_with_signal_stand_on_one_another() -> None:
    ends = loop.group_ends(
        draws(
            *(drawn("a", 1, 2), drawn("b", 1, 3)),
            drawn("c", 1, 4, outcome="zero_advantage", reason="all_correct"),
            drawn("d", 1, 0, of=0, outcome="stale", reason="deadline"),
            drawn("e", 2, 0, outcome="zero_advantage", reason="none_correct"),
            drawn("f", 2, 0, outcome="unused", reason="stage_ended"),
            drawn("g", None, 0, outcome="in_flight"),
        )
    )
    assert ends.select("step_from", "end", "groups", "below", "above").rows() == [
        (1, "trainable", 2, 0.0, 0.5),
        (1, "all correct", 1, 0.5, 0.75),
        (1, "stale", 1, 0.75, 1.0),
        (2, "none correct", 1, 0.0, 1.0),
    ]


def test_lag_counts_from_the_oldest_token_of_the_group(run: Run) -> None:
    # d1-0: step 1 under weights 0, written by 0. d2-0: step 3 under weights 2, written by 1 and 2.
    assert loop.staleness(run).rows() == [(0, 1, 0.5), (1, 1, 0.5)]


def test_measures_by_age(run: Run) -> None:
    assert loop.by_age(run.steps).rows() == [
        (2, 1, "clipped_fraction", 0.25),
        (2, 1, "k3", 0.5),
    ]


def test_idle_shares_are_weighted_by_time(run: Run) -> None:
    assert loop.over_time(run.steps, "learner_idle_share") == pytest.approx((1.0 + 0.5) / 6)
    assert loop.over_time(run.steps, "rollout_idle_share") == pytest.approx(1.0 / 6)
    assert loop.over_time(run.steps, "nothing") is None
    assert loop.idle(run.steps, columns=1).select("role", "share").rows() == [
        ("engines without a request", pytest.approx(1 / 6)),
        ("learner waits for groups", pytest.approx(0.25)),
    ]


def test_a_role_that_was_not_measured_is_absent() -> None:
    steps = pl.DataFrame(
        [{"stage": "rl", "step": 1, "step_s": 1.0, "learner_idle_share": 0.5}], schema=STEPS.schema
    )
    assert loop.idle(steps)["role"].to_list() == ["learner waits for groups"]


def test_teacher_weights_of_rl_and_of_sft() -> None:
    steps = pl.DataFrame(
        {
            "stage": ["sft", "rl"],
            "step": [10, 1],
            "trainer/distill/lambda": [0.9, None],
            "teacher/lambda": [None, 0.5],
        }
    )
    assert loop.distillation(steps).rows() == [("rl", 1, "lambda", 0.5), ("sft", 10, "lambda", 0.9)]


@pytest.fixture
def found(run: Run) -> dict[str, Finding]:
    return {finding.question: finding for finding in findings(run)}


class TestFindings:
    def test_what_each_stage_brought(self, found: dict[str, Finding]) -> None:
        assert found["What did it bring?"].answer == "Held-out pass@1: start .25 → rl .50."

    def test_the_hard_domain(self, found: dict[str, Finding]) -> None:
        assert found["Which domain is hard?"].answer == (
            "words: pass@1 .50 [.38, .62] after rl, .25 at the start. Easiest: sums, 1.00."
        )

    def test_what_was_pruned_by_whom(self, found: dict[str, Finding]) -> None:
        finding = found["What was pruned, and why?"]
        assert finding.answer == (
            "sft: 1 of 2 prompts dropped by drop easiest (pass rate 1.00);"
            " rl: 1 of 1 prompts dropped by re-screening (pass rate 1.00)."
        )
        assert finding.figures["sft/drop_easiest/dropped"] == 1

    def test_who_waits(self, found: dict[str, Finding]) -> None:
        finding = found["Is RL learner- or rollout-bound?"]
        assert finding.answer == (
            "Rollout-bound: the learner waited for groups 25% of the time, the engines stood"
            " still for 17% of theirs."
        )

    def test_staleness_that_costs_is_named(self, found: dict[str, Finding]) -> None:
        assert found["Does staleness hurt?"].answer == (
            "It costs: lag 1.00 steps on average, 1 at worst; effective sample size 50.0% of the"
            " batch; 25.00% of the tokens of age 1 clipped."
        )

    @pytest.mark.parametrize(
        ("learner", "rollout", "verdict"),
        [
            (0.02, 0.5, "Learner-bound"),
            (0.3, 0.1, "Rollout-bound"),
            (0.05, 0.05, "Balanced"),
            (0.05, None, "Not rollout-bound"),
        ],
    )
    def test_verdicts_about_waiting(
        self, run: Run, learner: float, rollout: float | None, verdict: str
    ) -> None:
        row = {"stage": "rl", "step": 1, "step_s": 1.0, "learner_idle_share": learner}
        steps = pl.DataFrame([row | {"rollout_idle_share": rollout}], schema=STEPS.schema)
        finding = bound(replace(run, steps=steps))
        assert finding is not None
        assert finding.answer.startswith(f"{verdict}: ")

    def test_without_an_evaluation_screening_says_what_is_hard(self, run: Run) -> None:
        finding = findings(replace(run, accuracy=run.accuracy.clear()))[0]
        assert finding.answer == "words: pass rate .12 in screening, over 2 prompts."
