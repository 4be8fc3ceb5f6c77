"""`posttrain inspect` and `posttrain audit --prompt`, as a user calls them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from inspect_runs import write_evaluation, write_known_run

from posttrain.cli import main
from posttrain.inspect.terminal import sparkline
from posttrain.prune.directory import STORE_NAME
from posttrain.run_dir import RunDir


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return write_known_run(tmp_path / "known")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["posttrain", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else 0
        return Done(code, *capsys.readouterr())

    return call


def test_tables_and_findings(call, run: RunDir) -> None:
    done = call("inspect", run.path)
    assert done.code == 0
    assert "Held-out pass@1: start .25 → rl .50." in done.out
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert "words 0.250 0.12–0.38 0.500 0.38–0.62" in lines
    assert "rl done 0:20 0.500" in lines
    assert "1 1 ██████████████████████████████ 0 1" in lines  # always right: dropped
    assert "learner waits 0.5 █▁ 0.125" in lines
    assert "sums 1 0 1" in lines  # trained, no signal, pruned


def test_json_is_one_object(call, run: RunDir) -> None:
    found = json.loads(call("inspect", run.path, "--json").out)
    (only,) = found["runs"]
    assert only["draws"] == {"trained": 2, "zero_advantage": 1, "in_flight": 1}
    assert only["prompts"] == {"pruned": 1, "trained": 2, "no signal": 1}
    assert only["findings"][0]["figures"] == {"start": 0.25, "rl": 0.5}
    assert only["problems"] == []
    assert "differences" not in found


def test_two_runs_with_intervals_on_the_differences(call, run: RunDir, tmp_path: Path) -> None:
    other = write_known_run(tmp_path / "better")
    write_evaluation(other, "rl", {"h1": 4, "h2": 2})
    done = call("inspect", run.path, other.path)
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert "better against known; held-out figures after rl" in lines
    assert "pass@1 all 0.500 0.750 +0.250 +0.250 to +0.250 2 prompts, paired" in lines
    found = json.loads(call("inspect", run.path, other.path, "--json").out)
    first = found["differences"][0]
    assert (first["metric"], first["difference"]) == (
        "pass@1",
        {"mean": 0.25, "low": 0.25, "high": 0.25},
    )


def test_what_cannot_be_read_is_named_and_the_rest_is_shown(call, run: RunDir) -> None:
    run.ledger_path.write_bytes(b"no database" * 100)
    done = call("inspect", run.path)
    assert done.code == 0
    assert "ledger.sqlite is no ledger" in " ".join(done.out.split())
    assert "rl .50" in done.out
    problems = json.loads(call("inspect", run.path, "--json").out)["runs"][0]["problems"]
    assert [Path(problem["source"]).name for problem in problems] == ["ledger.sqlite"]


def test_what_is_no_run_ends_with_2(call, tmp_path: Path) -> None:
    done = call("inspect", tmp_path)
    assert (done.code, done.out) == (2, "")
    assert "is no run: it holds none of config.yaml" in done.err


def test_a_pruned_set_is_no_run(call, tmp_path: Path) -> None:
    (tmp_path / STORE_NAME).touch()
    done = call("inspect", tmp_path)
    assert done.code == 2
    assert "was made by `posttrain prune` and is no run" in done.err


def test_a_run_that_has_only_begun(call, run: RunDir) -> None:
    run.ledger_path.unlink()
    run.metrics_path.unlink()
    run.manifest_path.unlink()
    assert "Nothing was recorded yet." in call("inspect", run.path).out


def test_the_report_goes_where_it_is_asked_for(call, run: RunDir, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    target = tmp_path / "report.html"
    assert f"report: {target}" in call("inspect", run.path, "--html", target).out
    assert target.read_text().startswith("<!DOCTYPE html>")


def test_audit_tells_the_life_of_a_prompt_with_texts_on_request(call, run: RunDir) -> None:
    brief = call("audit", run.path, "--prompt", "a2")
    assert "trained with advantages +0.250 +0.250 +0.250 -0.750, lag 0" in brief.out
    assert "What is a2?" not in brief.out
    assert "user: What is a2?" in call("audit", run.path, "--prompt", "a2", "--texts").out
    unknown = call("audit", run.path, "--prompt", "nobody")
    assert unknown.code == 2
    assert "has never judged or drawn such a prompt" in unknown.err


def test_sparklines_fit_any_number_of_values() -> None:
    assert sparkline([]) == ""
    assert sparkline([5.0]) == "▁"
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert len(sparkline([float(i % 7) for i in range(1000)], width=48)) == 48
