"""The frames of a run whose events are known, and of runs that are damaged or under way."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from inspect_runs import SETTINGS, decide, verdict, write_evaluation, write_known_run

from posttrain.data.prompts import content_hash
from posttrain.errors import DataError, PosttrainError, RunDirError
from posttrain.inspect import Run, describe, load_run, load_runs, stacked
from posttrain.inspect.columns import FRAMES
from posttrain.inspect.difficulty import screened
from posttrain.inspect.findings import gained
from posttrain.ledger import Ledger
from posttrain.metrics import surviving
from posttrain.pair_table import write_pairs
from posttrain.prompt_table import write_prompts
from posttrain.run_dir import RunDir
from posttrain.types import Action, Label, Message, PreferencePair, Prompt


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return write_known_run(tmp_path_factory.mktemp("inspect") / "known")


@pytest.fixture(scope="module")
def run(known: RunDir) -> Run:
    return load_run(known.path)


@pytest.fixture
def fresh(tmp_path: Path) -> RunDir:
    """One that a test may damage."""
    return write_known_run(tmp_path / "run")


def column(frame: pl.DataFrame, *names: str) -> list[Any]:
    return frame.select(names).rows() if len(names) > 1 else frame[names[0]].to_list()


def test_every_frame_has_the_documented_columns_and_types(run: Run) -> None:
    for name, frame in FRAMES.items():
        found = getattr(run, name).collect_schema()
        for column_name, dtype in frame.schema.items():
            assert found[column_name] == dtype, (name, column_name)
        further = set(found) - set(frame.columns)
        assert not further or frame.patterns, (name, further)
        assert describe(name)["column"].to_list()[: len(frame.columns)] == frame.names


def test_draws_are_those_of_the_surviving_lineage(run: Run) -> None:
    assert column(run.draws, "draw_id", "prompt_id", "outcome", "reason", "step", "attempt") == [
        ("d1-0", "a2", "trained", None, 1, 1),
        ("d1-1", "s1", "zero_advantage", "none_correct", 1, 1),
        ("d2-0", "s2", "trained", None, 3, 2),
        ("d2-1", "a2", "in_flight", None, None, 2),
    ]
    assert column(run.draws, "num_correct", "num_scored") == [(3, 4), (0, 4), (1, 4), (None, None)]
    assert column(run.draws, "drawn_at_step") == [0, 0, 1, 3]
    assert run.draws["drawn_at"].is_sorted()
    assert run.draws["stage"].unique().to_list() == ["rl"]


def test_verdicts_carry_what_was_decided_on_them(run: Run) -> None:
    assert column(run.verdicts, "prompt_id", "domain", "pass_rate", "step", "stage", "action") == [
        ("a1", "sums", 1.0, None, "sft", "drop"),
        ("a2", "sums", 0.5, None, "sft", "keep"),
        ("s1", "words", 0.0, None, None, None),
        ("s2", "words", 0.25, None, None, None),
        ("a1", "sums", 1.0, 2, "rl", "drop"),
    ]
    assert column(run.verdicts, "correct", "wrong", "infrastructure")[1] == (4, 4, 0)
    assert column(run.verdicts, "alpha", "beta")[3] == (2.5, 6.5)
    assert column(run.verdicts, "rule", "reason")[4] == ("re-screening", "easy at step 2")


def test_prompts_and_what_became_of_them(run: Run) -> None:
    names = ("prompt_id", "domain", "in_train", "in_held_out", "in_sft", "num_draws", "fate")
    assert column(run.prompts, *names) == [
        ("a1", "sums", True, False, True, 0, "pruned"),
        ("a2", "sums", True, False, True, 2, "trained"),
        ("s1", "words", True, False, False, 1, "no signal"),
        ("s2", "words", True, False, False, 1, "trained"),
        ("h1", "sums", False, True, False, 0, None),
        ("h2", "words", False, True, False, 0, None),
    ]
    assert column(run.prompts, "screened_rate", "label", "num_right", "num_scored")[:4] == [
        (1.0, "easy", 0, 0),
        (0.5, "medium", 3, 4),
        (0.0, "unsolved", 0, 4),
        (0.25, "medium", 1, 4),
    ]
    assert run.prompts["text"][0] == "user: What is a1?"
    assert json.loads(run.prompts["reference"][0]) == "A1"


def test_a_screening_that_was_done_again_counts_as_the_curriculum_read_it(fresh: RunDir) -> None:
    with Ledger(fresh.ledger_path) as ledger:
        again = verdict("a2", 1, 8, Label.HARD)
        ledger.record_decisions("sft", [decide(again, Action.KEEP, "drop_easiest", "kept")])
        only_rl = verdict("h1", 4, 4, Label.EASY, critic="rl:2.2")
        ledger.record_verdicts([verdict("a2", 7, 8, Label.EASY, critic="rl:2.2"), only_rl])
    run = load_run(fresh.path)
    rates = dict(column(run.prompts, "prompt_id", "screened_rate"))
    assert (rates["a2"], rates["h1"], rates["a1"]) == (0.125, None, 1.0)
    assert dict(column(run.prompts, "prompt_id", "label"))["a2"] == "easy"
    judged = column(screened(run.verdicts, run.prompts), "prompt_id", "pass_rate", "action")
    assert sorted(judged)[:2] == [("a1", 1.0, "drop"), ("a2", 0.125, "keep")]


def test_steps_that_a_resumed_attempt_did_again_count_once(run: Run) -> None:
    assert column(run.steps, "stage", "step", "attempt", "step_s", "elapsed_s") == [
        ("rl", 1, 1, 2.0, 2.0),
        ("rl", 2, 2, 4.0, 6.0),
    ]
    assert column(run.steps, "pool/sums/dropped") == [None, 1.0]
    assert column(run.steps, "rollout_idle_share") == [0.0, 0.25]
    assert run.rescreens.rows() == [("rl", 2, 1, 16, 2, 1, 0)]


def test_what_an_abandoned_attempt_recorded_beyond_its_checkpoint_is_left_out(
    fresh: RunDir,
) -> None:
    with fresh.metrics_path.open("a") as file:
        for step, attempt in ((3, 2), (4, 2), (3, 3)):
            file.write(json.dumps({"stage": "rl", "step": step, "attempt": attempt}) + "\n")
        file.write(json.dumps({"stage": "rl", "event": "evaluation", "step": 9}) + "\n")
    assert column(load_run(fresh.path).steps, "step", "attempt") == [(1, 1), (2, 2), (3, 3)]


def test_what_re_screening_decided_beyond_a_checkpoint_is_left_out(fresh: RunDir) -> None:
    with Ledger(fresh.ledger_path) as ledger:
        ledger.open_attempt("rl", 1)
    run = load_run(fresh.path)
    assert column(run.verdicts, "critic") == ["c0"] * 4
    assert dict(column(run.prompts, "prompt_id", "fate"))["a1"] == "never drawn"


@pytest.mark.parametrize(
    ("before", "held"),
    [
        ("s1 r1 s2 s3", "s1 r1 s2"),
        ("s1 s2 r1 r2 s3", "s1 s2"),  # beside training: the checkpoint was taken with s2
        ("s1 r2 s2 s3 r3", "s1 r2 s2"),  # in lock-step: before it
        ("s1 r1 s2 r2", "s1 r1 s2"),  # and ended there
        ("s1 s2 e2 s3", "s1 s2 e2"),  # the policy of step 2 is on the lineage
    ],
)
def test_a_re_screening_counts_where_the_checkpoint_holds_it(before: str, held: str) -> None:
    events = {"r": {"event": "rescreen"}, "e": {"event": "evaluation"}, "s": {}}
    told = {
        name: {"stage": "rl", "step": int(name[1]), "attempt": 1} | events[name[0]]
        for name in before.split()
    }
    resumed = {"stage": "rl", "step": 3, "attempt": 2}
    own = resumed | {"event": "rescreen"}  # in lock-step a slice comes before its step's record
    other = {"stage": "sft", "event": "rescreen", "step": 9}
    found = surviving([other, *told.values(), own, resumed])
    assert found == [other, *(told[name] for name in held.split()), own, resumed]


def test_accuracy_after_stages_and_during_rl_with_seconds_of_work(run: Run) -> None:
    of_all = run.accuracy.filter(pl.col("domain") == "all")
    assert column(of_all, "stage", "step", "elapsed_s", "mean", "low", "high") == [
        ("start", None, 10.0, 0.25, 0.125, 0.375),
        ("rl", None, 35.0, 0.5, 0.375, 0.625),
        ("rl", 1, 17.0, 0.375, 0.25, 0.5),  # start 10 s, screening 5 s, the first step 2 s
    ]
    assert column(run.stages, "stage", "state", "seconds", "pass@1") == [
        ("start", "done", 10.0, 0.25),
        ("screen", "done", 5.0, None),
        ("rl", "done", 20.0, 0.5),
        ("dpo", "running", None, None),
    ]
    assert json.loads(run.stages["metrics"][1]) == {"samples": 32}


def test_a_stage_that_was_resumed_takes_as_long_as_its_steps_at_least(fresh: RunDir) -> None:
    manifest = json.loads(fresh.manifest_path.read_text())
    manifest["stages"]["rl"]["seconds"] = 5.0  # of the last attempt; both steps took 6 s
    fresh.manifest_path.write_text(json.dumps(manifest))
    run = load_run(fresh.path)
    assert column(run.stages, "stage", "seconds")[2] == ("rl", 6.0)
    of_all = run.accuracy.filter((pl.col("domain") == "all") & (pl.col("stage") == "rl"))
    assert column(of_all, "step", "elapsed_s") == [(None, 21.0), (1, 17.0)]


def test_stages_that_the_settings_no_longer_name_are_no_part_of_the_result(
    fresh: RunDir,
) -> None:
    manifest = json.loads(fresh.manifest_path.read_text())
    stages = manifest["stages"]
    again = {name: stages[name] for name in ("start", "rl", "screen")}  # screening was done again
    left_out = {"sft": stages["rl"] | {"seconds": 100.0}}
    fresh.manifest_path.write_text(json.dumps(manifest | {"stages": left_out | again}))
    write_evaluation(fresh, "sft", {"h1": 4})
    with fresh.metrics_path.open("a") as file:
        event = {"stage": "sft", "event": "evaluation", "step": 5, "all": {}, "domains": {}}
        event["all"] = {"pass@1": {"mean": 0.9, "low": 0.8, "high": 1.0}}
        file.write(json.dumps(event) + "\n")
    run = load_run(fresh.path)
    assert column(run.stages, "stage") == ["start", "screen", "rl"]
    of_all = run.accuracy.filter(pl.col("domain") == "all")
    assert column(of_all, "stage", "elapsed_s") == [("start", 10.0), ("rl", 35.0), ("rl", 17.0)]
    assert run.evals["stage"].unique(maintain_order=True).to_list() == ["start", "rl"]
    finding = gained(run)
    assert finding is not None
    assert finding.answer == "Held-out pass@1: start .25 → rl .50."

    fresh.config_path.write_text("format: other\n")  # nothing says what was left out
    run = load_run(fresh.path, on_error="collect")
    assert column(run.stages, "stage") == ["sft", "start", "rl", "screen"]
    assert "sft" in set(run.evals["stage"]) & set(run.accuracy["stage"])


@pytest.mark.parametrize("rl", ["running", "set aside", "not measured"])
def test_what_rests_on_a_policy_that_is_being_replaced_is_no_part_of_the_result(
    fresh: RunDir, rl: str
) -> None:
    manifest = json.loads(fresh.manifest_path.read_text())
    stages = manifest["stages"]
    stages["dpo"] = stages["rl"] | {"seconds": 100.0}
    write_evaluation(fresh, "dpo", {"h1": 4})
    fresh.manifest_path.write_text(json.dumps(manifest))
    assert load_run(fresh.path).evals["stage"].unique(maintain_order=True).to_list() == [
        *("start", "rl", "dpo")
    ]
    of_before = stages.pop("rl")  # RL runs again, or is about to
    if rl != "set aside":
        state = "running" if rl == "running" else "done"
        stages["rl"] = of_before | {"state": state, "metrics": {}}
    fresh.manifest_path.write_text(json.dumps(manifest))
    run = load_run(fresh.path)
    begun = ["rl"] if rl != "set aside" else []
    assert column(run.stages, "stage") == ["start", "screen", *begun]
    assert set(column(run.evals, "stage")) == {"start"}
    at_the_end = run.accuracy.filter(pl.col("step").is_null())
    assert set(column(at_the_end, "stage")) == {"start"}


def test_evaluations_prompt_by_prompt_in_the_order_of_stages(run: Run) -> None:
    assert column(run.evals, "stage", "prompt_id", "pass_rate", "greedy_correct", "tokens") == [
        ("start", "h1", 0.25, False, 10.0),
        ("start", "h2", 0.25, False, 10.0),
        ("rl", "h1", 0.75, True, 10.0),
        ("rl", "h2", 0.25, False, 10.0),
    ]


def test_answers_are_read_when_they_are_asked_for(run: Run) -> None:
    found = run.answers.filter(pl.col("prompt_id") == "s2").collect()
    names = ("draw_id", "attempt", "correctness", "oldest_version")
    assert column(found, *names) == [
        *[("d1-2", 1, 1.0, "1.1")] * 4,  # voided, kept for the record
        ("d2-0", 2, 1.0, "2.1"),
        ("d2-0", 2, 0.0, "2.1"),
        ("d2-0", 2, 0.0, "2.2"),
        ("d2-0", 2, 0.0, "2.2"),
    ]


def test_answers_of_older_versions_lack_what_was_not_logged_then(fresh: RunDir) -> None:
    """A run that was begun by one and resumed by another has files of both."""
    first, *_ = files = sorted(fresh.rollouts_dir.glob("*.parquet"))
    assert len(files) == 2
    columns = ["draw_id", "attempt", "version_spans", "sampling"]
    whole = load_run(fresh.path).answers.select(columns).collect()
    assert whole.null_count().sum_horizontal().item() == 0
    pl.read_parquet(first).drop("version_spans", "sampling").write_parquet(first)
    found = load_run(fresh.path).answers.select(columns).collect()
    assert found["draw_id"].equals(whole["draw_id"])
    old = found.filter(pl.col("attempt") == 1)
    assert old.select("version_spans", "sampling").null_count().row(0) == (len(old), len(old))
    assert found.filter(pl.col("attempt") == 2).equals(whole.filter(pl.col("attempt") == 2))


def test_pairs_know_their_prompts(fresh: RunDir, tmp_path: Path) -> None:
    turns = (Message(role="user", content="What is a2?"),)
    asked = Prompt(
        prompt_id=content_hash(turns), messages=turns, reference=None, domain="from the table"
    )
    write_prompts(fresh.prompts_path, train=[asked], held_out=[], sft_rows=[])
    fresh.pairs_path.parent.mkdir()
    texts = {"chosen": "#2", "rejected": "#3", "corner_case": "wrong"}
    pair = PreferencePair(prompt=asked, system="brief", margin=1.0, **texts)
    write_pairs(fresh.pairs_path, [pair, replace(pair, system=None)])
    of_prompt = (asked.prompt_id, "from the table")
    assert load_run(fresh.path).pairs.rows() == [
        (*of_prompt, "brief", "wrong", 1.0, "#2", "#3"),
        (*of_prompt, None, "wrong", 1.0, "#2", "#3"),
    ]


def test_what_trl_logged_becomes_steps(fresh: RunDir) -> None:
    with fresh.metrics_path.open("a") as file:
        for logged in ({"loss": 0.25}, {"train_loss": 0.125}):
            file.write(json.dumps({"stage": "dpo", "step": 10, **logged}) + "\n")
    steps = load_run(fresh.path).steps.filter(pl.col("stage") == "dpo")
    assert column(steps, "step", "trainer/loss", "trainer/train_loss") == [(10, 0.25, 0.125)]


class TestUnderWay:
    def test_what_the_driver_has_flushed_is_seen_while_it_writes(self, fresh: RunDir) -> None:
        with Ledger(fresh.ledger_path) as ledger:
            attempt = ledger.open_attempt("rl", 3)
            ledger.open_draw(
                draw_id="d3-0",
                prompt_id="a1",
                domain="sums",
                system="brief",
                attempt=attempt,
                drawn_at_step=3,
            )
            assert "d3-0" not in load_run(fresh.path).draws["draw_id"]
            ledger.flush()
            assert load_run(fresh.path).draws.row(-1)[:4] == ("d3-0", "a1", "sums", "brief")

    def test_a_line_that_is_being_written_is_left_for_later(self, fresh: RunDir) -> None:
        whole = load_run(fresh.path).steps
        with fresh.metrics_path.open("a") as file:
            file.write('{"stage": "rl", "step": 3, "att')
        assert load_run(fresh.path).steps.equals(whole)

    def test_a_run_that_has_only_begun_is_empty(self, fresh: RunDir) -> None:
        for path in (fresh.ledger_path, fresh.metrics_path, fresh.prompts_path):
            path.unlink()
        for part in (*fresh.rollouts_dir.iterdir(), *fresh.evals_dir.iterdir()):
            part.unlink()
        manifest = json.loads(fresh.manifest_path.read_text())
        fresh.manifest_path.write_text(json.dumps(manifest | {"stages": {}}))
        begun = load_run(fresh.path)
        assert begun.is_empty
        assert not begun.problems
        assert all(getattr(begun, n).is_empty() for n in FRAMES if n != "answers")


class TestDamage:
    """Strict by default; otherwise what is left out is named and the rest is there."""

    def damage(self, run: RunDir, match: str, error: type[PosttrainError] = DataError) -> Run:
        with pytest.raises(error, match=match):
            load_run(run.path)
        loaded = load_run(run.path, on_error="collect")
        assert len(loaded.problems) == 1
        return loaded

    def test_a_line_of_metrics(self, fresh: RunDir) -> None:
        lines = fresh.metrics_path.read_text().splitlines()
        lines[1] = "}garbage{"
        fresh.metrics_path.write_text("\n".join(lines) + "\n")
        loaded = self.damage(fresh, "metrics.jsonl:2 is no JSON")
        assert column(loaded.steps, "step") == [2]

    def test_a_ledger(self, fresh: RunDir) -> None:
        fresh.ledger_path.write_bytes(b"no database at all" * 100)
        loaded = self.damage(fresh, "is no ledger", RunDirError)
        assert loaded.draws.is_empty()
        assert len(loaded.steps) == 2

    def test_an_answer_file(self, fresh: RunDir) -> None:
        (fresh.rollouts_dir / "002-00000.parquet").write_bytes(b"PAR1 torn")
        loaded = self.damage(fresh, "002-00000.parquet cannot be read")
        assert loaded.answers.select("attempt").unique().collect().rows() == [(1,)]

    def test_an_evaluation(self, fresh: RunDir) -> None:
        (fresh.evals_dir / "rl.json").write_text('[{"prompt_id": "h1"}]')
        loaded = self.damage(fresh, "rl.json is no evaluation")
        assert loaded.evals["stage"].unique().to_list() == ["start"]

    def test_the_prompts(self, fresh: RunDir) -> None:
        fresh.prompts_path.write_bytes(b"")
        loaded = self.damage(fresh, "prompts.parquet cannot be read")
        # Draws and evaluations know some domains; only screening knows a1.
        assert set(column(loaded.prompts, "prompt_id", "domain")) == {
            *{("a2", "sums"), ("s1", "words"), ("s2", "words"), ("h1", "sums"), ("h2", "words")},
            ("a1", None),
        }

    def test_a_run_of_another_version(self, fresh: RunDir) -> None:
        text = fresh.config_path.read_text().splitlines()
        fresh.config_path.write_text("\n".join(["format: posttrain run 0", *text[1:]]))
        loaded = self.damage(fresh, "was not written by this version", RunDirError)
        assert loaded.settings == {}
        assert len(loaded.draws) == 4

    def test_a_manifest_of_another_version(self, fresh: RunDir) -> None:
        fresh.manifest_path.write_text('{"stages": {"rl": {"status": "fine"}}}')
        loaded = self.damage(fresh, "manifest.json was not written by this version")
        assert loaded.stages.is_empty()
        assert column(loaded.steps, "elapsed_s") == [2.0, 6.0]


@pytest.mark.parametrize("content", [None, "file", "directory"])
def test_what_is_no_run_is_refused_either_way(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "x"
    if content == "file":
        path.write_text("x")
    elif content == "directory":
        path.mkdir()
        (path / "notes.txt").write_text("x")
    message = {None: "is not there", "file": "is a file", "directory": "is no run: it holds none"}
    for on_error in ("raise", "collect"):
        with pytest.raises(RunDirError, match=message[content]):
            load_run(path, on_error=on_error)  # type: ignore[arg-type]


def test_an_unknown_way_with_errors_is_refused(known: RunDir) -> None:
    with pytest.raises(ValueError, match="got 'ignore'"):
        load_run(known.path, on_error="ignore")  # type: ignore[arg-type]


def test_runs_side_by_side_have_names_of_their_own(known: RunDir, tmp_path: Path) -> None:
    other = write_known_run(tmp_path / "known")
    runs = load_runs([known.path, other.path])
    draws = stacked(runs, "draws")
    assert draws.columns[:2] == ["run", "draw_id"]
    assert draws["run"].unique(maintain_order=True).to_list() == [str(known.path), str(other.path)]
    assert len(stacked(runs, "answers")) == 32
    assert stacked(runs[:1], "evals")["run"].unique().to_list() == ["known"]


def test_in_pandas_and_in_a_notebook(run: Run) -> None:
    frames = run.to_pandas()
    assert list(frames["draws"]["num_correct"][:3]) == [3, 0, 1]
    assert run.settings == SETTINGS
    html = run._repr_html_()
    assert "<h4>known</h4>" in html
    cells = re.findall(r"<td[^>]*>(.*?)</td>", html)
    assert "|rl|done|0:20|0.500|" in "|".join(cells)
    assert "|<code>.draws</code>|4|" in "|".join(cells)
