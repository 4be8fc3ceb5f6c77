"""The report: one file that opens offline. It is opened in a browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import altair as alt
import polars as pl
import pytest
from inspect_runs import write_known_run, write_long_run

from posttrain.errors import SettingsError
from posttrain.inspect import Problem, Run, charts, load_run
from posttrain.inspect.page import write_report

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return load_run(write_known_run(tmp_path / "run").path)


@pytest.fixture
def report(run: Run, tmp_path: Path) -> str:
    pytest.importorskip("vl_convert")
    write_report(run, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text()


def test_asks_the_network_for_nothing(report: str) -> None:
    html, script = report.split('<script type="module">')
    assert not re.findall(r"<script|<link|<img|<iframe|@import|url\(", html)
    assert not re.findall(r"""(?:import|from)\s*\(?["']http""", script)


def test_holds_every_chart_and_the_findings(report: str) -> None:
    for name in charts.__all__:
        assert f'id="{name}"' in report
    assert "Rollout-bound: the learner waited for groups 25% of the time" in report
    specs = json.JSONDecoder().raw_decode(report, report.index('{"domain_accuracy"'))[0]
    assert specs["trainable_share"]["title"]["text"] == "Share of groups that could be trained on"


def test_texts_of_a_run_are_no_html(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    hostile = "</script><script>alert(1)</script>"
    problem = Problem(source=tmp_path / "x", message=hostile)
    renamed = replace(run, name=hostile, problems=(problem,))
    write_report(renamed, tmp_path / "report.html")
    assert hostile not in (tmp_path / "report.html").read_text()


def test_without_the_package_of_the_javascript_it_is_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    with pytest.raises(SettingsError, match="pip install vl-convert-python"):
        write_report(run, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_long_run_has_a_page_of_the_usual_size(run: Run, report: str, tmp_path: Path) -> None:
    long = load_run(write_long_run(tmp_path / "long", last_step=750))
    write_report(long, tmp_path / "long.html")
    assert (tmp_path / "long.html").stat().st_size < len(report) + 300_000


def test_a_chart_of_more_rows_than_altair_lets_into_a_notebook(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    drawable = run.prompts.drop_nulls("fate")
    many = pl.concat([drawable[:1]] * 6000).with_row_index("n")
    domains = many.with_columns(pl.format("domain {}", "n").alias("domain")).drop("n")
    crowded = replace(run, prompts=domains)
    with pytest.raises(alt.MaxRowsError):
        charts.where_prompts_went(crowded).to_dict()
    write_report(crowded, tmp_path / "report.html")
    assert "domain 5999" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_a_browser_draws_every_chart(report: str, tmp_path: Path) -> None:
    assert BROWSER is not None
    done = subprocess.run(
        [
            *(BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=10000"),
            (tmp_path / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.count("<svg") >= len(charts.__all__)
    assert "Share of groups that could be trained on</text>" in done.stdout
